import numpy as np
import pytest
from scipy import stats

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import feature_sets
from cm3leon_jax.evaluation.metrics import frechet_distance as module
from cm3leon_jax.evaluation.metrics.frechet_distance import (
  _mean_and_factor,
  frechet_distance,
  frechet_interval,
)
from tests.refusals import refused

# (rows, width, rank) of features: full rank, a subspace, fewer rows than dimensions.
KINDS = [(400, 24, 24), (400, 24, 7), (15, 48, 48)]
SIZE = 4  # Number of rows per group.


def two_sets(rng, n=400, width=24, rank=24):
  """Draws two sets with different means and covariances in the same `rank`-dimensional subspace."""
  basis = rng.normal(size=(rank, width)) / np.sqrt(width)
  first = rng.normal(size=(n, rank))
  second = rng.normal(size=(n + 3, rank)) * np.linspace(0.5, 2, rank) + 0.3
  return first @ basis, second @ basis


def distance_of(first, second):
  return frechet_distance(feature_sets.two_sets(first, second))


def distance_without_covariances(first, second):
  """Computes the distance from rows: tr (C1 C2)^(1/2) is the sum of singular values of X Y^T."""
  means = first.mean(0), second.mean(0)
  x, y = ((rows - m) / np.sqrt(len(rows) - 1) for rows, m in zip((first, second), means))
  cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
  return ((means[0] - means[1]) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross


def covariance_of(rows, counts=None):
  counts = np.ones(len(rows)) if counts is None else np.asarray(counts)
  mean, factor = _mean_and_factor(rows, counts)
  return mean, factor.T @ factor


@pytest.mark.parametrize("width", [2, 9])
def test_counts_repeat_rows(width, monkeypatch):
  rows, counts = np.random.default_rng(0).normal(3.0, 1.0, (6, width)), [2, 0, 1, 3, 0, 1]
  repeated = covariance_of(np.repeat(rows, counts, axis=0))
  for block in (4096, 4, 1):
    monkeypatch.setattr(module, "BLOCK", block)
    for found, expected in zip(covariance_of(rows, counts), repeated):
      np.testing.assert_allclose(found, expected, atol=1e-13)


def test_features_that_are_not_finite_are_refused():
  with refused(UserError, "row 1"):
    distance_of(np.ones((2, 2)), [[1.0, 2.0], [1.0, np.nan]])


def test_the_distance_is_that_of_the_docstring():
  assert distance_of([[-1], [0], [1]], [[-1], [1], [3]]) == pytest.approx(2.0, abs=1e-15)


@pytest.mark.parametrize(("n", "width", "rank"), KINDS)
def test_properties_of_the_distance(n, width, rank):
  rng = np.random.default_rng(0)
  first, second = two_sets(rng, n, width, rank)
  distance = distance_of(first, second)
  assert distance > 0.1
  assert distance_of(second, first) == pytest.approx(distance, rel=1e-11)
  turn = stats.ortho_group.rvs(width, random_state=rng)
  assert distance_of(first @ turn + 5.0, second @ turn + 5.0) == pytest.approx(distance, rel=1e-10)
  assert distance_of(3 * first, 3 * second) == pytest.approx(9 * distance, rel=1e-11)
  dead = np.zeros((1, 5))
  assert distance_of(
    np.hstack([first, dead.repeat(len(first), 0)]), np.hstack([second, dead.repeat(len(second), 0)])
  ) == pytest.approx(distance, rel=1e-11)
  assert 0 <= distance_of(first, first[::-1]) < 1e-12
  shift = rng.normal(size=width)
  assert distance_of(first, first + shift) == pytest.approx(shift @ shift, rel=1e-11)


def torch_fidelity_distance(first, second):
  module = pytest.importorskip("torch_fidelity.metric_fid")
  torch = pytest.importorskip("torch")
  found = [module.fid_features_to_statistics(torch.tensor(rows)) for rows in (first, second)]
  return module.fid_statistics_to_metric(*found, False)["frechet_inception_distance"]


# torch-fidelity computes the square root of a singular matrix, which is exact only to half of the
# digits.
@pytest.mark.parametrize(("kind", "tolerance"), list(zip(KINDS, [1e-12, 1e-6, 1e-6])))
def test_torch_fidelity_agrees(kind, tolerance):
  first, second = two_sets(np.random.default_rng(1), *kind)
  expected = torch_fidelity_distance(first, second)
  exact = distance_without_covariances(first, second)
  assert distance_of(first, second) == pytest.approx(exact, rel=1e-11)
  assert distance_of(first, second) == pytest.approx(expected, rel=tolerance)
  assert distance_of(first, 1.0001 * second) != pytest.approx(expected, rel=tolerance)


def sample_sets(rng, num_groups, width, is_equal=False, is_paired=False):
  """Draws two sets of rows in groups of similar rows; `is_paired` uses the same groups in both."""
  common = rng.normal(size=(2, num_groups, 1, width))
  if is_paired:
    common[1] = common[0]
  own = rng.normal(size=(2, num_groups, SIZE, width))
  first, second = (0.9 * common + np.sqrt(1 - 0.9**2) * own).reshape(2, -1, width)
  return first, second if is_equal else second * np.linspace(0.7, 1.5, width) + 0.3


def coverage(num_groups, width, is_equal=False, simulations=200, resamples=60, with_rows=False):
  """Returns, for several kinds of intervals, the share that contains the expected distance.

  `not_corrected` (negative control) keeps the bias. `limit` compares the interval without its bias
  with the distance of 20,000 groups. `of_rows` (negative control) treats each row as a group.
  """
  rng = np.random.default_rng(0)

  def distance(size):
    return distance_of(*sample_sets(rng, size, width, is_equal))

  expected = np.mean([distance(num_groups) for _ in range(400)])
  limit = np.mean([distance(20_000) for _ in range(5)])
  groups, rows = np.repeat(np.arange(num_groups), SIZE), np.arange(num_groups * SIZE)
  covered = {"interval": 0, "not_corrected": 0, "limit": 0, "of_rows": 0}
  for seed in range(simulations):
    x, y = sample_sets(rng, num_groups, width, is_equal)
    found = frechet_interval(x, groups, y, groups + num_groups, resamples, seed)
    low, high, bias = found["low"], found["high"], found["bias"]
    covered["interval"] += low <= expected <= high
    covered["not_corrected"] += low + bias <= expected <= high + bias
    covered["limit"] += low - bias <= limit <= high - bias
    if with_rows:
      alone = frechet_interval(x, rows, y, rows + len(rows), resamples, seed)
      covered["of_rows"] += alone["low"] <= expected <= alone["high"]
  return {name: count / simulations for name, count in covered.items()}


@pytest.mark.slow
def test_intervals_over_groups_cover_at_their_level_and_others_do_not():
  found = coverage(num_groups=30, width=8, simulations=80, resamples=40, with_rows=True)
  assert found["interval"] >= 0.92
  assert found["not_corrected"] < 0.75
  assert found["of_rows"] < 0.85


def width_of(interval):
  return interval["high"] - interval["low"]


def test_the_interval_is_that_of_the_docstring():
  groups = ["fox", "fox", "cat", "cat"]
  found = frechet_interval([[0], [2], [5], [7]], groups, [[1], [3], [5], [7]], groups)
  resamples = found.pop("resamples")
  assert len(resamples) == 100
  assert np.mean(resamples) == pytest.approx(found["distance"] + found["bias"])
  expected = {"distance": 0.53, "low": 0.0, "high": 0.96, "bias": 0.04}
  assert found == pytest.approx(expected | {"groups": 2, "effective_groups": 2.0}, abs=5e-3)


def test_groups_of_both_sets_are_drawn_together():
  x, y = sample_sets(np.random.default_rng(0), 20, 3, is_paired=True)
  names = [f"caption {i // SIZE}" for i in range(len(x))]
  others = [f"{name} of the reference" for name in names]
  half = names[: len(x) // 2] + others[len(x) // 2 :]
  itself = frechet_interval(x, names, x, names, 20)
  assert (itself["low"], itself["high"]) == pytest.approx((0, 0), abs=1e-12)
  together, partly, apart = (
    width_of(frechet_interval(x, names, y, own)) for own in (names, half, others)
  )
  assert together < 0.9 * partly < 0.81 * apart


def test_one_group_has_no_interval():
  x, y = sample_sets(np.random.default_rng(0), 2, 3)
  groups, one = [0] * SIZE + [1] * SIZE, [0] * 2 * SIZE
  for found in (
    frechet_interval(x, one, y, groups),
    frechet_interval(x, groups, y, [2] * 2 * SIZE),
    frechet_interval(x, [0] * SIZE + [1] * SIZE, y, [1] * SIZE + [2] * SIZE),
  ):
    assert found["distance"] == pytest.approx(distance_of(x, y))
    assert found["low"] is found["high"] is found["bias"] is None


def test_a_resample_has_the_distance_of_its_repeated_rows():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(12, 40)), rng.normal(0.3, 1.5, size=(20, 40))
  counts = np.array([3] + [1] * 9 + [0] * 2), np.ones(20, int)
  for width in (40, 5):  # More dimensions than rows, and fewer.
    sets = x[:, :width], y[:, :width]
    expected = distance_without_covariances(np.repeat(sets[0], counts[0], axis=0), sets[1])
    assert frechet_distance(sets, counts) == pytest.approx(expected, rel=1e-9)
    assert distance_of(*sets) != pytest.approx(expected, rel=1e-3)
