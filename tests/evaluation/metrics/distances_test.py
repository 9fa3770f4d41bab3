import numpy as np
import pytest
from scipy import stats
from scipy.spatial import distance

from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics import distances
from cm3leon_jax.evaluation.metrics.distances import (
  cmmd,
  frechet_distance,
  kid,
  polynomial_mmd,
  precision_recall,
)
from tests.refusals import refused

# (rows, width, rank) of features: full rank, a subspace, fewer rows than dimensions.
KINDS = [(400, 24, 24), (400, 24, 7), (15, 48, 48)]


def in_subspace(rng, n=400, width=24, rank=24):
  """Draws two sets with different means and covariances in the same `rank`-dimensional subspace."""
  basis = rng.normal(size=(rank, width)) / np.sqrt(width)
  first = rng.normal(size=(n, rank))
  second = rng.normal(size=(n + 3, rank)) * np.linspace(0.5, 2, rank) + 0.3
  return first @ basis, second @ basis


def two_sets(seed=0, n=230, m=210, width=16, scale=1.3, shift=0.2):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, width)), rng.normal(size=(m, width)) * scale + shift


def unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_values_are_those_of_the_docstrings():
  assert frechet_distance([[-1], [0], [1]], [[-1], [1], [3]]) == pytest.approx(2.0, abs=1e-15)
  assert polynomial_mmd([[0], [1]], [[0], [2]]) == -13.0
  assert cmmd([[2, 0]], [[0, 5]]) == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-12)
  found = precision_recall([[0], [1], [9]], [[2], [4.5], [5]], neighbors=1)
  assert found == {"precision": 2 / 3, "recall": 1.0}


@pytest.mark.parametrize("measure", [frechet_distance, polynomial_mmd, cmmd, precision_recall])
def test_blocks_do_not_change_the_values(measure, monkeypatch):
  x, y = two_sets()
  whole = measure(x, y)
  for block in (7, 210, 229, 230):
    monkeypatch.setattr(distances, "BLOCK", block)
    assert measure(x, y) == pytest.approx(whole, abs=1e-10)
  assert measure(x[:-9], y) != pytest.approx(whole, rel=1e-6)


def test_sets_that_cannot_be_compared_are_refused():
  with refused(UserError, "row 1"):
    frechet_distance(np.ones((2, 2)), [[1.0, 2.0], [1.0, np.nan]])
  rows = np.arange(6.0).reshape(6, 1)
  for sets in ((rows[:3], rows), (rows, rows[:3])):
    with refused(UserError, "more than 3 images", "3"):
      precision_recall(*sets)


@pytest.mark.parametrize(("n", "width", "rank"), KINDS)
def test_properties_of_the_frechet_distance(n, width, rank):
  rng = np.random.default_rng(0)
  first, second = in_subspace(rng, n, width, rank)
  found = frechet_distance(first, second)
  assert found > 0.1
  assert frechet_distance(second, first) == pytest.approx(found, rel=1e-11)
  turn = stats.ortho_group.rvs(width, random_state=rng)
  turned = frechet_distance(first @ turn + 5.0, second @ turn + 5.0)
  assert turned == pytest.approx(found, rel=1e-10)
  assert frechet_distance(3 * first, 3 * second) == pytest.approx(9 * found, rel=1e-11)
  with_dead = (np.pad(rows, ((0, 0), (0, 5))) for rows in (first, second))
  assert frechet_distance(*with_dead) == pytest.approx(found, rel=1e-11)
  assert 0 <= frechet_distance(first, first[::-1]) < 1e-12
  shift = rng.normal(size=width)
  assert frechet_distance(first, first + shift) == pytest.approx(shift @ shift, rel=1e-11)


# torch-fidelity computes the square root of a singular matrix, which is exact only to half of the
# digits.
@pytest.mark.parametrize(("kind", "tolerance"), list(zip(KINDS, [1e-12, 1e-6, 1e-6])))
def test_torch_fidelity_has_the_same_frechet_distance(kind, tolerance):
  oracle = pytest.importorskip("torch_fidelity.metric_fid")
  torch = pytest.importorskip("torch")
  first, second = in_subspace(np.random.default_rng(1), *kind)
  found = [oracle.fid_features_to_statistics(torch.tensor(rows)) for rows in (first, second)]
  expected = oracle.fid_statistics_to_metric(*found, False)["frechet_inception_distance"]
  assert frechet_distance(first, second) == pytest.approx(expected, rel=tolerance)
  assert frechet_distance(first, 1.0001 * second) != pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("measure", [polynomial_mmd, cmmd])
def test_properties_of_the_kernel_distances(measure):
  x, y = two_sets()
  found = measure(x, y)
  assert found > 0.05
  assert measure(y, x) == pytest.approx(found, abs=1e-10)
  assert measure(x[::-1], y) == pytest.approx(found, abs=1e-10)
  turn = stats.ortho_group.rvs(x.shape[1], random_state=0)
  assert measure(x @ turn, y @ turn) == pytest.approx(found, abs=1e-10)
  assert measure(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(found, rel=1e-4)


def test_subsets_have_the_rows_of_the_smaller_set_if_it_has_fewer():
  x, y = two_sets(n=300, m=40)
  assert kid(x, y, num_subsets=5)["subset_size"] == 40
  whole = kid(x[:40], y, num_subsets=5)
  assert whole["mean"] == pytest.approx(polynomial_mmd(x[:40], y), rel=1e-10)
  assert whole["std"] < 1e-12


def test_torch_fidelity_has_the_same_kid_on_the_same_subsets():
  oracle = pytest.importorskip("torch_fidelity.metric_kid")
  torch = pytest.importorskip("torch")
  x, y = two_sets()

  def theirs(seed):
    sets = torch.tensor(x), torch.tensor(y)
    found = oracle.kid_features_to_metric(
      *sets, kid_subsets=20, kid_subset_size=60, rng_seed=seed, verbose=False
    )
    return found[oracle.KEY_METRIC_KID_MEAN], found[oracle.KEY_METRIC_KID_STD]

  ours = kid(x, y, 20, 60, seed=2020)
  assert (ours["mean"], ours["std"]) == pytest.approx(theirs(2020), rel=1e-11)
  assert ours["mean"] != pytest.approx(theirs(2021)[0], rel=1e-4)


def test_torch_fidelity_has_the_same_biased_distance():
  oracle = pytest.importorskip("torch_fidelity.metric_kid")
  x, y = (rows[:200] for rows in two_sets())

  def theirs(estimator):
    kernels = (
      oracle.kernel_rbf(unit(a), unit(b), kid_kernel_rbf_sigma=10)
      for a, b in ((x, x), (x, y), (y, y))
    )
    return 1000 * oracle.mmd2(*kernels, mmd_est=estimator)

  assert cmmd(x, y) == pytest.approx(theirs("biased"), abs=1e-10)
  assert cmmd(x, y) != pytest.approx(theirs("unbiased"), abs=1e-3)


def share_inside(rows, others, neighbors):
  """Follows the definition. Sorted distances start with the distance of a row to itself."""
  radii = np.sort(distance.cdist(others, others), axis=1)[:, neighbors]
  return (distance.cdist(rows, others) <= radii).any(1).mean()


@pytest.mark.parametrize(("neighbors", "scale"), [(1, 0.6), (3, 1.0), (5, 1.5)])
def test_precision_and_recall_are_those_of_the_definition(neighbors, scale):
  real, generated = two_sets(width=6, scale=scale, shift=0.3)
  assert precision_recall(generated, real, neighbors) == {
    "precision": share_inside(generated, real, neighbors),
    "recall": share_inside(real, generated, neighbors),
  }


def test_copies_of_an_image_lie_in_a_ball_without_radius():
  rng = np.random.default_rng(0)
  copies = np.repeat(rng.normal(1000, 1, (2, 64)), 5, axis=0).astype(np.float32)
  assert precision_recall(copies[:5], copies) == {"precision": 1.0, "recall": 0.5}
  copies = np.repeat(rng.normal(1, 1, (20, 333)), 5, axis=0).astype(np.float32)
  assert precision_recall(copies[:20:2], copies)["precision"] == 1.0
