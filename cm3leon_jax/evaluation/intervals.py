"""Computes means of dependent observations. The 95% confidence intervals resample whole groups."""

# n observations, G groups.

from collections.abc import Hashable, Sequence
from typing import Any

from etils import epy
import numpy as np
import numpy.typing as npt

with epy.lazy_imports():  # Takes half a second, and a single sample needs no interval.
  from scipy import stats

LEVEL = 0.95
NUM_RESAMPLES = 10_000


def mean_interval(
  sums: npt.ArrayLike,
  weights: npt.ArrayLike,
  groups: Sequence[Hashable] | np.ndarray,
  num_resamples: int = NUM_RESAMPLES,
  seed: int = 0,
) -> dict[str, Any]:
  """Computes sum(sums) / sum(weights), with a bootstrap interval that resamples whole groups.

    sums = [2, 4, 9], weights = [1, 1, 1], groups = ["fox", "fox", "cat"]
    result = {"mean": 5.0, "low": 3.0, "high": 9.0, "groups": 2, "effective_groups": 1.8}

  Observations of one group (e.g. of one concept, or of one prompt) resemble each other. Therefore a
  resample draws G groups with replacement and takes all observations of each drawn group.

  A percentile interval over few groups is too narrow. Therefore its level is raised (expanded
  percentile interval: Hesterberg, "What Teachers Should Know About the Bootstrap", 2015). The level
  depends on the effective number of groups.

  Args:
    sums: [n] a number for each observation, or the paired difference of two numbers.
    weights: [n] positive numbers. If `sums` are sums over tokens, use the numbers of tokens. For a
      plain mean, use ones.
    groups: [n] the group of each observation, as a name or an integer id.

  Returns:
    {"mean", "low", "high", "groups", "effective_groups"}. If there is only one group, `low` and
    `high` are None, because one group does not show how much groups vary.
  """
  _, places = np.unique(np.asarray(groups), return_inverse=True)
  sums = np.bincount(places, np.asarray(sums, np.float64))
  weights = np.bincount(places, np.asarray(weights, np.float64))
  effective = effective_number(weights)
  result = {"mean": float(_ratio(sums, weights)), "low": None, "high": None}
  if len(sums) > 1:
    bootstrap = stats.bootstrap(
      (sums, weights),
      _ratio,
      n_resamples=num_resamples,
      batch=500,
      vectorized=True,
      paired=True,
      confidence_level=percentile_level(effective),
      method="percentile",
      rng=seed,
    )
    low, high = bootstrap.confidence_interval
    result |= {"low": float(low), "high": float(high)}
  return {**result, "groups": len(sums), "effective_groups": effective}


def _ratio(sums: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
  return sums.sum(axis) / weights.sum(axis)


def effective_number(weights: np.ndarray) -> float:
  """Returns Kish's effective number of groups. It is G if all G groups have the same weight."""
  return float(weights.sum() ** 2 / (weights**2).sum())


def percentile_level(n: float) -> float:
  """Returns the level at which a percentile interval of `n` > 1 groups is as wide as a t interval.

  percentile_level(6) = 0.995, percentile_level(100) = 0.954, percentile_level(1e6) = 0.95
  """
  t = stats.t.ppf((1 + LEVEL) / 2, n - 1)
  return float(2 * stats.norm.cdf(np.sqrt(n / (n - 1)) * t) - 1)


def describe_groups(interval: dict, noun: str = "concept") -> str:
  """Formats the number of groups of a `mean_interval`. `noun` is the singular name of a group.

  describe_groups({"groups": 101, "effective_groups": 23.8, ...}) = "101 concepts (effectively 24)"
  """
  count, effective = interval["groups"], round(interval["effective_groups"])
  groups = f"1 {noun}" if count == 1 else f"{count} {noun}s"
  return groups if effective == count else f"{groups} (effectively {effective})"


def describe_share(measure: dict | None) -> str:
  """Formats a share with its confidence interval, e.g. "81.0% [77.4, 84.1]". None becomes "-"."""
  if measure is None:
    return "-"
  text = f"{measure['share']:.1%}"
  if measure["low"] is None:
    return text
  return f"{text} [{100 * measure['low']:.1f}, {100 * measure['high']:.1f}]"
