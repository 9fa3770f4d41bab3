"""Defines what a metric reads: the samples of a column, and what they are compared with.

The result of a metric has `value`, and where it can be computed a 95% interval, `low` and `high`.
By `values`, one for each example, or `resamples`, two evaluations are compared pair by pair.
"""

# n examples, E width of embeddings, C candidates, R resamples.

from collections.abc import Sequence
import dataclasses
from typing import TypeVar

import numpy as np

from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.protocols.features import Images

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ColumnSamples:
  """Samples of a column, and what they are compared with.

  Attributes:
    name: of the column.
    lines: of the n best samples, without codes.
    examples: n of them.
    groups: [n] of the examples.
    images: of the samples; None for texts.
    reference: the real images; None for texts.
    captions: [n, E] embeddings of the prompts by the CLIP of scores, or None.
    likelihoods: [n] log p(caption | image) - log p(caption) in nats by the model, or None.
    agreements: [n] probability of "yes" to whether the image shows its caption, or None.
    candidates: of each example [C] log-probabilities of its candidates in nats, or None.
    verdicts: whether each image is judged wholly right, or None.
    seed: of resamples.
    num_resamples: of intervals of means.
  """

  name: str
  lines: list[dict]
  examples: list[Example]
  groups: list[str]
  images: Images | None = None
  reference: Images | None = None
  captions: np.ndarray | None = None
  likelihoods: np.ndarray | None = None
  agreements: np.ndarray | None = None
  candidates: list[np.ndarray] | None = None
  verdicts: np.ndarray | None = None
  seed: int = 0
  num_resamples: int = intervals.NUM_RESAMPLES


def present(value: T | None) -> T:
  """Returns what a metric reads; raises ValueError if it is absent: `Metric.needs` lacks it."""
  if value is None:
    raise ValueError("a metric reads what it does not say that it needs.")
  return value


def mean(values: Sequence[float | None], column: ColumnSamples) -> dict:
  """Averages a number of each example; examples with None do not count. None if all have None."""
  places = [i for i, value in enumerate(values) if value is not None]
  if not places:
    return {"value": None, "samples": 0}
  some = np.array([values[i] for i in places], np.float64)
  groups = [column.groups[i] for i in places]
  interval = intervals.mean_interval(
    some, np.ones(len(some)), groups, column.num_resamples, column.seed
  )
  return {
    "value": interval.pop("mean"),
    **interval,
    "samples": len(some),
    "values": [None if value is None else float(value) for value in values],
  }
