"""Computes a 95% interval of the Frechet distance that resamples groups of images.

The distance of n rows is biased upward, because means and covariances are estimates. A resample
estimates them a second time, so its distance is biased twice, and the percentiles of resamples can
lie wholly above the distance. Therefore they are moved down by `bias`, the mean distance of the
resamples less the distance. The interval is then one of the distance as it is reported: that of
other groups of the same number, bias included.

The interval is too wide where the bias dominates: equal distributions, or few groups for the width
d of the features. With 20 d groups or more, distance, low and high less `bias` estimate the
distance of infinitely many rows. With fewer groups `bias` is too small, with less than d groups
far too small.
"""

# n rows of the images in question, m rows of the reference, d numbers in a row, G groups.

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.metrics.moments import Moments, frechet_distance, two_sets

NUM_RESAMPLES = 100
BLOCK = 4096  # Rows that become float64 at once.


def frechet_interval(
  rows: npt.ArrayLike,
  groups: Sequence[Hashable] | np.ndarray,
  reference: npt.ArrayLike | Moments,
  reference_groups: Sequence[Hashable] | np.ndarray | None = None,
  num_resamples: int = NUM_RESAMPLES,
  seed: int = 0,
) -> dict[str, Any]:
  """Computes the Frechet distance of two sets of features, and a bootstrap interval over groups.

    rows = [[0], [2], [5], [7]], groups = ["fox", "fox", "cat", "cat"]
    reference = [[1], [3], [5], [7]], reference_groups = groups
    result = {"distance": 0.53, "low": 0.0, "high": 0.96, "bias": 0.04,
              "groups": 2, "effective_groups": 2.0, "resamples": [0.0, 1.0, ...]}

  A resample takes as many groups as there are, with replacement, each with all of its rows. A group
  with rows in both sets, such as the caption of a generated and of a real image, is drawn once for
  both. The percentiles are expanded as those of `intervals.mean_interval`. A resample costs as much
  as the moments of both sets and a `frechet_distance`; with fewer rows than d far less.

  Args:
    rows: [n, d] features, in memory.
    groups: [n] names, or ids in an integer array; rows of equal ones belong together.
    reference: [m, d] features; or `Moments`, which stay the same in all resamples: the interval
      then leaves out that the reference is a sample, too.
    reference_groups: [m] as `groups`; None for `Moments`.
    num_resamples: bootstrap resamples.
    seed: of the bootstrap.

  Returns:
    `groups` is the number of groups of `rows`, `effective_groups` that of Kish, in the set that
    has fewer. `low` is at least 0. `resamples` are the distances of the resamples, before they are
    moved; with equal groups and seed they are of equal draws, so they can be compared in pairs.
    `low`, `high`, `bias` and `resamples` are None if a set has one group.

  Raises:
    UserError: fewer than 2 rows in a set, rows without a group, names in one set and ids in the
      other, or rows of two widths.
  """
  sets, places, fixed = _placed_sets(rows, groups, reference, reference_groups)
  is_few = not fixed and _are_few(*sets)

  def distance(counts: Sequence[np.ndarray]) -> float:
    if is_few:
      return _distance_of_few(sets, counts)
    first, second = (*(_moments(*pair) for pair in zip(sets, counts)), *fixed)
    return frechet_distance(first, second)

  found = distance([np.ones(len(one)) for one in sets])
  sizes = [np.bincount(where)[np.unique(where)] for where in places]
  effective = min(float(size.sum() ** 2 / (size**2).sum()) for size in sizes)
  absent = dict.fromkeys(("low", "high", "bias", "resamples"))
  result: dict[str, Any] = {"distance": found, **absent}
  strata = _strata(places)
  if min(map(len, sizes)) > 1 and max(map(len, strata)) > 1:
    rng = np.random.default_rng(seed)
    distances = [distance(_draw(strata, places, rng)) for _ in range(num_resamples)]
    result |= _percentiles(np.array(distances), found, effective)
  return {**result, "groups": len(sizes[0]), "effective_groups": effective}


def _are_few(first: npt.ArrayLike, second: npt.ArrayLike) -> bool:
  """Returns whether both sets have fewer rows than their width."""
  sets = two_sets(first, second, at_least=2)
  return max(map(len, sets)) < sets[0].shape[1]


def _percentiles(distances: np.ndarray, found: float, effective: float) -> dict:
  """Returns the interval of a distance from those of its resamples, for `effective` groups."""
  bias = float(np.mean(distances)) - found
  tail = (1 - intervals.percentile_level(effective)) / 2
  low, high = np.quantile(distances, [tail, 1 - tail]) - bias
  return {"low": max(0.0, float(low)), "high": float(high), "bias": bias, "resamples": distances}


def _placed_sets(
  rows: Any, groups: Any, reference: Any, reference_groups: Any
) -> tuple[list[Any], list[np.ndarray], list[Moments]]:
  """Returns the sets that are resampled, the number of each row's group, and what stays as it is.

  Equal names have equal numbers: ["fox", "cat"] and ["fox", "dog"] are [2, 0] and [2, 1].
  """
  is_fixed = isinstance(reference, Moments)
  if is_fixed != (reference_groups is None):
    raise UserError("the reference must be rows with reference_groups, or moments without.")
  sets = [rows] if is_fixed else [rows, reference]
  names = [groups] if is_fixed else [groups, reference_groups]
  for one, own in zip(sets, names):
    if len(one) != len(own):
      raise UserError(f"{len(one)} rows of features need as many groups, not {len(own)}.")
  names = [np.asarray(own) for own in names]
  if len({own.dtype.kind in "iu" for own in names}) > 1:
    raise UserError("groups and reference_groups must both be names, or both integers.")
  _, places = np.unique(np.concatenate(names), return_inverse=True)
  return sets, np.split(places, [len(rows)])[: len(sets)], [reference] if is_fixed else []


def _strata(places: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Sorts groups by the sets that they are in.

  _strata([[2, 0], [2, 1]]) = [[2], [0], [1]]: in both sets, in the first, in the second
  """
  if len(places) == 1:
    return [np.unique(places[0])]
  first, second = places
  return [np.intersect1d(first, second), np.setdiff1d(first, second), np.setdiff1d(second, first)]


def _draw(
  strata: Sequence[np.ndarray], places: Sequence[np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
  """Draws groups, as many of each stratum as it has; returns how often each row of a set counts."""
  drawn = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
  counts = np.bincount(drawn, minlength=1 + max(where.max() for where in places))
  return [counts[where] for where in places]


def _distance_of_few(sets: Sequence[npt.ArrayLike], counts: Sequence[np.ndarray]) -> float:
  """`frechet_distance` of fewer rows than their width, by matrices of that many rows.

  Centered rows over sqrt(n - 1) are factors of the covariance, as those of `moments._factor` are.
  """
  means, factors = [], []
  for rows, weights in zip(sets, counts):
    rows, total = np.asarray(rows, np.float64), weights.sum()
    means.append(weights @ rows / total)
    factors.append((rows - means[-1]) * np.sqrt(weights / (total - 1))[:, None])
  shift, (first, second) = means[0] - means[1], factors
  cross = linalg.svdvals(first @ second.T).sum()
  traces = np.sum(first**2) + np.sum(second**2)
  return max(0.0, float(shift @ shift + traces - 2 * cross))


def _moments(rows: npt.ArrayLike, counts: np.ndarray) -> Moments:
  rows = np.asarray(rows)
  moments = Moments(rows.shape[-1])
  for start in range(0, len(rows), BLOCK):
    moments.add(rows[start : start + BLOCK], counts[start : start + BLOCK])
  return moments
