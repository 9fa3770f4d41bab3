import numpy as np
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics.frechet_interval import _distance_of_few, frechet_interval
from cm3leon_jax.evaluation.metrics.moments import Moments, frechet_distance
from tests.messages import refused

SIZE = 4  # Number of rows per group.


def moments_of(rows):
  moments = Moments(np.shape(rows)[1])
  moments.add(rows)
  return moments


def sample_sets(rng, num_groups, width, is_equal=False, is_paired=False):
  """Samples two sets whose rows are similar within a group; paired groups match across sets."""
  common = rng.normal(size=(2, num_groups, 1, width))
  if is_paired:
    common[1] = common[0]
  own = rng.normal(size=(2, num_groups, SIZE, width))
  first, second = (0.9 * common + np.sqrt(1 - 0.9**2) * own).reshape(2, -1, width)
  return first, second if is_equal else second * np.linspace(0.7, 1.5, width) + 0.3


def coverage(num_groups, width, is_equal=False, simulations=200, resamples=60, with_rows=False):
  """Returns the shares of intervals that contain the expected distance.

  Negative controls: `not_corrected` keeps the bias. `limit` compares the interval without its bias
  with the distance of 20,000 groups. `of_rows` treats each row as a group.
  """
  rng = np.random.default_rng(0)

  def distance(size):
    return frechet_distance(*map(moments_of, sample_sets(rng, size, width, is_equal)))

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


@pytest.mark.slow
@pytest.mark.parametrize(
  ("num_groups", "width", "is_equal"), [(200, 4, False), (10, 32, False), (60, 8, True)]
)
def test_intervals_cover_at_least_at_their_level(num_groups, width, is_equal):
  """Cases: many groups for the width, few groups, equal distributions."""
  found = coverage(num_groups, width, is_equal)
  assert found["interval"] >= 0.91
  if num_groups == 200:
    assert found["interval"] <= 0.98
    assert 0.91 <= found["limit"] <= 0.98
  elif num_groups == 10:
    assert found["not_corrected"] < 0.5


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


def test_a_reference_of_moments_stays_the_same():
  rng = np.random.default_rng(0)
  x, y = sample_sets(rng, 20, 3)
  groups = np.repeat(np.arange(20), SIZE)
  sampled = frechet_interval(x, groups, y, groups + 20)
  fixed = frechet_interval(x, groups, moments_of(y))
  assert fixed["distance"] == pytest.approx(sampled["distance"], rel=1e-12)
  assert width_of(fixed) < 0.9 * width_of(sampled)
  assert 0 < fixed["bias"] < sampled["bias"]


def test_names_and_order_of_groups_do_not_matter():
  x, y = sample_sets(np.random.default_rng(0), 12, 3)
  groups, names = np.repeat(np.arange(12), SIZE), np.repeat([f"{i:02}" for i in range(12)], SIZE)
  order = np.random.default_rng(1).permutation(len(x))
  found = frechet_interval(x, groups, y, groups, 20)
  mixed = frechet_interval(x[order], names[order], y, names, 20)
  assert mixed.pop("resamples") == pytest.approx(found.pop("resamples"), rel=1e-9)
  assert mixed == pytest.approx(found, rel=1e-9)


def test_effective_groups_are_those_of_the_set_with_fewer():
  x, y = sample_sets(np.random.default_rng(0), 3, 2)
  groups = [0] * 9 + [1] * 3
  found = frechet_interval(x, groups, y, range(10, 22), 20)
  assert (found["groups"], found["effective_groups"]) == (2, pytest.approx(1.6))
  swapped = frechet_interval(y, range(10, 22), x, groups, 20)
  assert (swapped["groups"], swapped["effective_groups"]) == (12, pytest.approx(1.6))


def test_one_group_has_no_interval():
  x, y = sample_sets(np.random.default_rng(0), 2, 3)
  groups, one = [0] * SIZE + [1] * SIZE, ["fox"] * 2 * SIZE
  for found in (
    frechet_interval(x, one, moments_of(y)),
    frechet_interval(x, groups, y, [2] * 2 * SIZE),
    frechet_interval(x, [0] * SIZE + [1] * SIZE, y, [1] * SIZE + [2] * SIZE),
  ):
    assert found["distance"] == pytest.approx(frechet_distance(moments_of(x), moments_of(y)))
    assert found["low"] is found["high"] is found["bias"] is None


def test_sets_without_groups_are_refused():
  x, y = sample_sets(np.random.default_rng(0), 2, 3)
  groups = range(len(x))
  with refused(UserError):
    frechet_interval(x, groups, y, [0, 1, 2])
  for reference, own in ((y, None), (moments_of(y), groups)):
    with refused(UserError):
      frechet_interval(x, groups, reference, own)
  with refused(UserError):
    frechet_interval(x, groups, y, [str(i) for i in groups])
  with refused(UserError):
    frechet_interval(x[:1], [0], y, groups)
  with refused(UserError):
    frechet_interval(x, groups, moments_of(y[:, :2]))


def test_fewer_rows_than_numbers_in_a_row_have_the_distance_of_their_moments():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(12, 40)), rng.normal(0.3, 1.5, size=(20, 40))
  found = frechet_interval(x, range(12), y, range(12, 32), 5)
  assert found["distance"] == pytest.approx(
    frechet_distance(moments_of(x), moments_of(y)), rel=1e-9
  )
  # A resample repeats some rows and omits others.
  counts = np.array([3] + [1] * 9 + [0] * 2), np.ones(20, int)
  repeated = np.repeat(x, counts[0], axis=0)
  expected = frechet_distance(moments_of(repeated), moments_of(y))
  assert _distance_of_few((x, y), counts) == pytest.approx(expected, rel=1e-9)
