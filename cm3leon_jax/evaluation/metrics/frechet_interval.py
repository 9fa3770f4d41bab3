"""Computes a 95% interval of the Frechet distance by resampling groups of images.

The distance of n rows is biased upward, because means and covariances are estimates. A resample
estimates them a second time, so its distance is biased twice. The percentiles of the resamples can
even be larger than the distance itself. Therefore they are moved down by `bias`, which is the mean
distance of the resamples minus the distance. The interval thus belongs to the reported distance,
which is biased. It shows how this distance varies if other groups are chosen, in equal number.

The interval is too wide where the bias dominates. This happens if the distributions are equal, or
if there are few groups compared with the width d of the features. To estimate the distance of
infinitely many rows, subtract `bias` from `distance`, `low` and `high`. This needs at least 20 d
groups. With fewer groups, `bias` is too small. With fewer than d groups, it is far too small.
"""

# n rows of the measured images, m rows of the reference, d numbers in a row.

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.metrics.moments import Moments, frechet_distance, two_sets

NUM_RESAMPLES = 100
BLOCK = 4096  # Number of rows that are converted to float64 at a time.


def frechet_interval(
  rows: npt.ArrayLike,
  groups: Sequence[Hashable] | np.ndarray,
  reference: npt.ArrayLike | Moments,
  reference_groups: Sequence[Hashable] | np.ndarray | None = None,
  num_resamples: int = NUM_RESAMPLES,
  seed: int = 0,
) -> dict[str, Any]:
  """Computes the Frechet distance of two sets of features, and its bootstrap interval over groups.

    rows = [[0], [2], [5], [7]], groups = ["fox", "fox", "cat", "cat"]
    reference = [[1], [3], [5], [7]], reference_groups = groups
    result = {"distance": 0.53, "low": 0.0, "high": 0.96, "bias": 0.04,
              "groups": 2, "effective_groups": 2.0, "resamples": [0.0, 1.0, ...]}

  A resample draws as many groups as there are, with replacement, and takes all rows of each drawn
  group. If a group has rows in both sets, such as a caption with a generated and a real image, it
  is drawn for both sets together. The percentiles are expanded as in `intervals.mean_interval`.
  Each resample computes the moments of both sets and a `frechet_distance`. Resamples are much
  cheaper to compute if both sets have fewer than d rows.

  Args:
    rows: [n, d] features, in memory.
    groups: [n] the group of each row, as a name or an integer id.
    reference: [m, d] features, or `Moments`. `Moments` are the same in all resamples. The interval
      then does not show how the distance varies with the choice of the reference.
    reference_groups: [m] the group of each row of the reference; None for `Moments`.

  Returns:
    `groups` is the number of groups of `rows`. `effective_groups` is the smaller of the effective
    numbers of groups (Kish) of the two sets. `low` is at least 0. `resamples` are the distances of
    the resamples before they are moved. Calls with equal groups and equal seeds draw the same
    groups, so their resamples can be compared in pairs. `low`, `high`, `bias` and `resamples` are
    None if a set has only one group.

  Raises:
    UserError: a set has fewer than 2 rows, a row has no group, the groups of one set are names and
      the groups of the other set are ids, or the sets differ in width.
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
  """Computes the interval of the distance `found` from the distances of the resamples."""
  bias = float(np.mean(distances)) - found
  tail = (1 - intervals.percentile_level(effective)) / 2
  low, high = np.quantile(distances, [tail, 1 - tail]) - bias
  return {"low": max(0.0, float(low)), "high": float(high), "bias": bias, "resamples": distances}


def _placed_sets(
  rows: Any, groups: Any, reference: Any, reference_groups: Any
) -> tuple[list[Any], list[np.ndarray], list[Moments]]:
  """Returns the sets to resample, a group number for each of their rows, and the fixed moments.

  Groups with equal names get equal numbers: ["fox", "cat"] and ["fox", "dog"] become [2, 0] and
  [2, 1].
  """
  is_fixed = isinstance(reference, Moments)
  if is_fixed != (reference_groups is None):
    raise UserError("the reference must be rows with reference_groups, or moments without them.")
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
  """Splits groups by the sets that contain them.

  _strata([[2, 0], [2, 1]]) = [[2], [0], [1]]: in both sets, in the first, in the second
  """
  if len(places) == 1:
    return [np.unique(places[0])]
  first, second = places
  return [np.intersect1d(first, second), np.setdiff1d(first, second), np.setdiff1d(second, first)]


def _draw(
  strata: Sequence[np.ndarray], places: Sequence[np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
  """Resamples the groups of each stratum with replacement. Counts how often each row was drawn."""
  drawn = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
  counts = np.bincount(drawn, minlength=1 + max(where.max() for where in places))
  return [counts[where] for where in places]


def _distance_of_few(sets: Sequence[npt.ArrayLike], counts: Sequence[np.ndarray]) -> float:
  """Computes `frechet_distance` of sets with fewer rows than their width, with small matrices.

  Centered rows, divided by sqrt(n - 1), are factors of the covariance, as in `moments._factor`.
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
