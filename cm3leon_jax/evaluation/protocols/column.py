"""Defines the input of a metric: the samples of a column, and the data to compare them with.

The result of a metric has `value` and, if an interval can be computed, the bounds `low` and `high`
of a 95% interval. The result may also have `values` (one per example) or `resamples`, which allow a
paired comparison of two evaluations.
"""

# n examples, E width of embeddings, C candidates.

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
  """Samples of a column, and the data to compare them with.

  Attributes:
    lines: JSON values of the best sample of each example, without codes.
    groups: [n] the group of each example, for intervals.
    images: generated images; None for texts.
    reference: real images; None for texts.
    captions: [n, E] embeddings of the prompts by the CLIP model for scores, or None.
    likelihoods: [n] log p(caption | image) - log p(caption) by the model, in nats, or None.
    agreements: [n] probability that the model answers "yes" to the question whether the image shows
      its caption, or None.
    candidates: [C] log-probabilities of the candidates of each example, in nats, or None.
    verdicts: [n] whether the judge finds each image wholly right, or None.
  """

  name: str
  lines: list[dict]
  examples: list[Example]
  groups: list[str]
  images: Images | None = None
  reference: Images | None = None
  captions: np.ndarray | None = None
  likelihoods: list[float] | None = None
  agreements: list[float] | None = None
  candidates: list[list[float]] | None = None
  verdicts: list[bool] | None = None
  seed: int = 0
  num_resamples: int = intervals.NUM_RESAMPLES


def present(value: T | None) -> T:
  """Returns an input of a metric. Raises ValueError for None: `Metric.needs` lacks the input."""
  if value is None:
    raise ValueError("a metric reads an input that its `Metric.needs` does not name.")
  return value


def mean(values: Sequence[float | None], column: ColumnSamples) -> dict:
  """Averages one number per example, except None. If all are None, the `value` is None."""
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
