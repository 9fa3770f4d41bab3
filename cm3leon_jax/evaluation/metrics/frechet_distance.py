"""Computes the Frechet distance between two sets of features, with a 95% confidence interval.

With finitely many rows, the distance is biased upward, because means and covariances are estimates.
A resample estimates them a second time, so its distance is biased twice. The percentiles of the
resamples can even be larger than the distance itself. Therefore the percentiles are moved down by
`bias`, which is the mean distance of the resamples minus the distance. The interval is for the
reported distance, which is biased. It shows how this distance would vary with another choice of
equally many groups.

The bias dominates, and the interval is too wide, if the distributions are equal, or if there are
few groups compared with d, the number of features per row. To estimate the distance for infinitely
many rows, subtract `bias` from `distance`, `low` and `high`. This estimate needs at least 20 d
groups. With fewer groups, `bias` is too small. With fewer than d groups, `bias` is far too small.
"""

# n rows of generated images, m rows of the reference, d features per row, r rows of a factor.

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.metrics.feature_sets import two_sets

NUM_RESAMPLES = 100
BLOCK = 4096  # Number of rows that are converted to float64 at a time.


def frechet_interval(
  rows: npt.ArrayLike,
  groups: Sequence[Hashable] | np.ndarray,
  reference: npt.ArrayLike,
  reference_groups: Sequence[Hashable] | np.ndarray,
  num_resamples: int = NUM_RESAMPLES,
  seed: int = 0,
) -> dict[str, Any]:
  """Computes the Frechet distance of two sets of features; bootstraps groups for its interval.

    rows = [[0], [2], [5], [7]], groups = ["fox", "fox", "cat", "cat"]
    reference = [[1], [3], [5], [7]], reference_groups = groups
    result = {"distance": 0.53, "low": 0.0, "high": 0.96, "bias": 0.04,
              "groups": 2, "effective_groups": 2.0, "resamples": [0.0, 1.0, ...]}

  A resample draws groups with replacement, as many as exist, and takes all rows of each drawn
  group. If a group has rows in both sets, such as a caption with a generated and a real image, it
  is drawn for both sets together. The percentiles are expanded as in `intervals.mean_interval`.
  Resamples are much cheaper to compute if both sets have fewer than d rows.

  Args:
    rows: [n, d] features, in memory.
    groups: [n] the group of each row, as a name or an integer id.
    reference: [m, d] features.
    reference_groups: [m] the group of each row of the reference.

  Returns:
    `groups` is the number of groups of `rows`. `effective_groups` is the smaller of the effective
    numbers of groups (Kish) of the two sets. `low` is at least 0. `resamples` contains the distance
    of each resample, before `bias` is subtracted. Calls with equal groups and equal seeds draw the
    same groups, so their resamples can be compared in pairs. `low`, `high`, `bias` and `resamples`
    are None if a set has only one group.
  """
  sets = two_sets(rows, reference)
  # Groups with equal names get equal numbers: ["fox", "cat"] and ["fox", "dog"] become [2, 0] and
  # [2, 1].
  names = [np.asarray(groups), np.asarray(reference_groups)]
  _, numbers = np.unique(np.concatenate(names), return_inverse=True)
  places = np.split(numbers, [len(names[0])])
  found = frechet_distance(sets)
  sizes = [np.bincount(where)[np.unique(where)] for where in places]
  effective = min(map(intervals.effective_number, sizes))
  absent = dict.fromkeys(("low", "high", "bias", "resamples"))
  result: dict[str, Any] = {"distance": found, **absent}
  strata = _strata(places)
  if min(map(len, sizes)) > 1 and max(map(len, strata)) > 1:
    rng = np.random.default_rng(seed)
    draws = (_draw(strata, places, rng) for _ in range(num_resamples))
    distances = np.array([frechet_distance(sets, counts) for counts in draws])
    bias = float(np.mean(distances)) - found
    low, high = (end - bias for end in intervals.percentiles(distances, effective))
    result |= {"low": max(0.0, low), "high": high, "bias": bias, "resamples": distances}
  return {**result, "groups": len(sizes[0]), "effective_groups": effective}


def _strata(places: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Returns the groups in both sets, the groups only in the first, and those only in the second.

  _strata([[2, 0], [2, 1]]) = [[2], [0], [1]]
  """
  first, second = places
  return [np.intersect1d(first, second), np.setdiff1d(first, second), np.setdiff1d(second, first)]


def _draw(
  strata: Sequence[np.ndarray], places: Sequence[np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
  """Resamples the groups of each stratum. Returns, for each set, how often each row was drawn."""
  drawn = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
  counts = np.bincount(drawn, minlength=1 + max(where.max() for where in places))
  return [counts[where] for where in places]


def frechet_distance(
  sets: Sequence[np.ndarray], counts: Sequence[np.ndarray] | None = None
) -> float:
  """Returns the Frechet distance between the normal distributions of two sets of features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    sets = [[-1], [0], [1]] and [[-1], [1], [3]], means 0 and 1, variances 1 and 4
    result = 1 + 1 + 4 - 2 * 2 = 2.0

  This is the squared distance of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule
  Converge to a Local Nash Equilibrium" (2017). With features of Inception, it is the FID. The trace
  of (C1 C2)^(1/2) is computed as the sum of the singular values of F1 F2^T, where F^T F = C.
  Singular values are real and nonnegative for covariances of any rank. A matrix square root of
  C1 C2, which is not symmetric, can become complex or fail.

  Rounding can make the distance of nearly equal sets negative, by about 1e-15 of the traces. The
  result is then 0. The distance is biased upward, more so with fewer images. Compare only distances
  between equally large sets.

  `sets` are results of `two_sets` with at least 2 rows each. `counts` contains, for each set, how
  often each row counts. If it is None, each row counts once.
  """
  counts = [np.ones(len(rows)) for rows in sets] if counts is None else counts
  means, factors = zip(*map(_mean_and_factor, sets, counts))
  shift = means[0] - means[1]
  traces = sum(np.sum(factor**2) for factor in factors)
  cross = linalg.svdvals(factors[0] @ factors[1].T).sum()
  return max(0.0, float(shift @ shift + traces - 2 * cross))


def _mean_and_factor(rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean of rows [n, d] and a factor F [r, d] of their covariance, F^T F.

  The covariance is the unbiased estimate. If n < d, the rows of F are the centered rows, scaled.
  Otherwise the rows of F are eigenvectors of the covariance, scaled. If columns are linearly
  dependent, some eigenvalues are rounding errors. Such eigenvalues are dropped, because their
  square roots (about 1e-8) would add up.
  """
  total, width = counts.sum(), rows.shape[1]
  mean = sum((own @ x for x, own in _blocks(rows, counts)), np.zeros(width)) / total
  centered = ((x - mean) * np.sqrt(own / (total - 1))[:, None] for x, own in _blocks(rows, counts))
  if len(rows) < width:
    return mean, np.concatenate(list(centered))
  covariance = sum((x.T @ x for x in centered), np.zeros((width, width)))
  values, vectors = np.linalg.eigh(covariance)  # Eigenvalues are in ascending order.
  kept = values > width * np.finfo(np.float64).eps * values[-1]
  return mean, (vectors[:, kept] * np.sqrt(values[kept])).T


def _blocks(rows: np.ndarray, counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields blocks of (rows as float64, their counts), without rows whose count is 0."""
  for start in range(0, len(rows), BLOCK):
    own = counts[start : start + BLOCK]
    yield np.asarray(rows[start : start + BLOCK][own > 0], np.float64), own[own > 0]
