import numpy as np
import pytest
from scipy import stats

from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics import frechet_distance as module
from cm3leon_jax.evaluation.metrics.frechet_distance import frechet_distance
from tests.refusals import refused

# (rows, width, rank) of features: full rank, a subspace, fewer rows than dimensions.
KINDS = [(400, 24, 24), (400, 24, 7), (15, 48, 48)]


def two_sets(rng, n=400, width=24, rank=24):
  """Draws two sets with different means and covariances in the same `rank`-dimensional subspace."""
  basis = rng.normal(size=(rank, width)) / np.sqrt(width)
  first = rng.normal(size=(n, rank))
  second = rng.normal(size=(n + 3, rank)) * np.linspace(0.5, 2, rank) + 0.3
  return first @ basis, second @ basis


def distance_without_covariances(first, second):
  """Computes the distance from rows: tr (C1 C2)^(1/2) is the sum of singular values of X Y^T."""
  means = first.mean(0), second.mean(0)
  x, y = ((rows - m) / np.sqrt(len(rows) - 1) for rows, m in zip((first, second), means))
  cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
  return ((means[0] - means[1]) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross


def test_features_that_are_not_finite_are_refused():
  with refused(UserError, "row 1"):
    frechet_distance(np.ones((2, 2)), [[1.0, 2.0], [1.0, np.nan]])


def test_blocks_do_not_change_the_distance(monkeypatch):
  sets = two_sets(np.random.default_rng(0))
  expected = frechet_distance(*sets)
  monkeypatch.setattr(module, "BLOCK", 7)
  assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-12)


def test_the_distance_is_that_of_the_docstring():
  assert frechet_distance([[-1], [0], [1]], [[-1], [1], [3]]) == pytest.approx(2.0, abs=1e-15)


@pytest.mark.parametrize(("n", "width", "rank"), KINDS)
def test_properties_of_the_distance(n, width, rank):
  rng = np.random.default_rng(0)
  first, second = two_sets(rng, n, width, rank)
  distance = frechet_distance(first, second)
  assert distance > 0.1
  assert frechet_distance(second, first) == pytest.approx(distance, rel=1e-11)
  turn = stats.ortho_group.rvs(width, random_state=rng)
  assert frechet_distance(first @ turn + 5.0, second @ turn + 5.0) == pytest.approx(
    distance, rel=1e-10
  )
  assert frechet_distance(3 * first, 3 * second) == pytest.approx(9 * distance, rel=1e-11)
  dead = np.zeros((1, 5))
  assert frechet_distance(
    np.hstack([first, dead.repeat(len(first), 0)]), np.hstack([second, dead.repeat(len(second), 0)])
  ) == pytest.approx(distance, rel=1e-11)
  assert 0 <= frechet_distance(first, first[::-1]) < 1e-12
  shift = rng.normal(size=width)
  assert frechet_distance(first, first + shift) == pytest.approx(shift @ shift, rel=1e-11)


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
  assert frechet_distance(first, second) == pytest.approx(exact, rel=1e-11)
  assert frechet_distance(first, second) == pytest.approx(expected, rel=tolerance)
  assert frechet_distance(first, 1.0001 * second) != pytest.approx(expected, rel=tolerance)
