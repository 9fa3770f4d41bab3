"""Defines the input of a metric: the samples of a column, and the data to compare them with.

The result of a metric has `value` and, if an interval can be computed, the bounds `low` and `high`
of a 95% confidence interval.
"""

# n examples, E embedding width, C candidate answers.

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
    lines: line of the samples file for the best sample of each example, without its codes.
    groups: [n] the group of each example; intervals resample groups.
    images: generated images; None for texts.
    reference: real images; None for texts.
    captions: [n, E] CLIP embeddings of the prompts, or None.
    likelihoods: [n] log p(caption | image) - log p(caption) by the model, in nats, or None.
    agreements: [n] probability that the model answers "yes" to the question whether the image shows
      its caption, or None.
    candidates: for each example, [C] log-probabilities of its candidate answers in nats; or None.
    verdicts: [n] whether each image shows exactly what its caption says, or None.
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
  """Returns `value`. Raises ValueError if it is None, because `Metric.needs` does not list it."""
  if value is None:
    raise ValueError("a metric uses an input that is not computed: add it to its `Metric.needs`.")
  return value


def mean(values: Sequence[float | None], column: ColumnSamples) -> dict:
  """Averages one number per example, skipping None. If all are None, `value` is None."""
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
  }
