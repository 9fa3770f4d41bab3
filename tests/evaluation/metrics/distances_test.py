import numpy as np
import pytest
from scipy import linalg
from scipy.spatial import distance

from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics.distances import cmmd, frechet_distance, kid, precision_recall
from tests.refusals import refused

pytest.importorskip("torch_fidelity")


def two_sets(n=230, m=210, width=16, scale=1.3, shift=0.2):
  rng = np.random.default_rng(0)
  return rng.normal(size=(n, width)), rng.normal(size=(m, width)) * scale + shift


def test_sets_that_cannot_be_compared_are_refused():
  with refused(UserError, "row 1"):
    frechet_distance(np.ones((2, 2)), [[1.0, 2.0], [1.0, np.nan]])
  rows = np.arange(6.0).reshape(6, 1)
  for sets in ((rows[:3], rows), (rows, rows[:3])):
    with refused(UserError, "more than 3 images", "has 3"):
      precision_recall(*sets)


def test_the_frechet_distance_is_that_of_the_definition():
  first, second = two_sets()
  means = [rows.mean(0) for rows in (first, second)]
  a, b = (np.cov(rows, rowvar=False) for rows in (first, second))
  expected = ((means[0] - means[1]) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
  assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
  assert frechet_distance(first, np.roll(first, 1, 0)) == pytest.approx(0, abs=1e-9)


def test_subsets_have_the_rows_of_the_smaller_set_if_it_has_fewer():
  """With a set of 40 rows, each subset is this set, so the distance is that of the whole sets."""
  x, y = (rows[:40] for rows in two_sets())
  same, apart = (
    ((a @ b.T / 16 + 1) ** 3) for a, b in ((np.concatenate([x, y]),) * 2, (x, y))
  )  # fmt: skip
  within = [same[:40, :40], same[40:, 40:]]
  expected = sum((k.sum() - np.trace(k)) / (40 * 39) for k in within) - 2 * apart.mean()
  found = kid(x, y, seed=1)
  assert found == {"mean": pytest.approx(expected), "std": pytest.approx(0), "subset_size": 40}
  assert kid(two_sets(n=1100)[0], y)["subset_size"] == 40


def test_subsets_depend_on_the_seed():
  x, y = two_sets(n=1100, m=1050)
  first, again, other = (kid(x, y, seed) for seed in (1, 1, 2))
  assert first == again != other
  assert first["subset_size"] == 1000


@pytest.mark.parametrize("block", [64, 1024])
def test_cmmd_is_the_biased_distance_of_a_gaussian_kernel(block, monkeypatch):
  monkeypatch.setattr("cm3leon_jax.evaluation.metrics.distances.BLOCK", block)
  assert cmmd([[2, 0]], [[0, 5]]) == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-12)
  x, y = two_sets()
  u, v = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
  pairs = ((u, u), (v, v), (u, v))
  same, other, between = (np.exp(-(distance.cdist(a, b) ** 2) / 200).mean() for a, b in pairs)
  assert cmmd(x, y) == pytest.approx(1000 * (same + other - 2 * between), abs=1e-9)


def share_inside(rows, others):
  """Follows the definition. Sorted distances start with the distance of a row to itself."""
  radii = np.sort(distance.cdist(others, others), axis=1)[:, 3]
  return pytest.approx((distance.cdist(rows, others) <= radii).any(1).mean())


def test_precision_and_recall_are_those_of_the_definition():
  real, generated = two_sets(width=6, shift=0.3)
  found = precision_recall(generated, real)
  assert found == {
    "precision": share_inside(generated, real),
    "recall": share_inside(real, generated),
  }
  assert found["precision"] != found["recall"]
