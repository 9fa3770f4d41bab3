import numpy as np
import pytest
from scipy import stats

from cm3leon_jax.evaluation.metrics import kernel_distance
from cm3leon_jax.evaluation.metrics.kernel_distance import cmmd, kid, polynomial_mmd

DISTANCES = [polynomial_mmd, cmmd]


def two_sets(seed=0, n=230, m=210, width=16):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, width)), rng.normal(size=(m, width)) * 1.3 + 0.2


def unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_distances_are_those_of_the_docstrings():
  assert polynomial_mmd([[0], [1]], [[0], [2]]) == -13.0
  assert cmmd([[2, 0]], [[0, 5]]) == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-12)


def test_the_polynomial_distance_leaves_out_pairs_of_a_row_with_itself():
  x, y = two_sets(n=9, m=7, width=3)
  within = [
    np.mean([(a @ b / 3 + 1) ** 3 for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
    for z in (x, y)
  ]
  between = np.mean([(a @ b / 3 + 1) ** 3 for a in x for b in y])
  assert polynomial_mmd(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


@pytest.mark.parametrize("measure", DISTANCES)
def test_properties_of_the_distances(measure):
  x, y = two_sets()
  found = measure(x, y)
  assert found > 0.05
  assert measure(y, x) == pytest.approx(found, abs=1e-10)
  assert measure(x[::-1], y) == pytest.approx(found, abs=1e-10)
  turn = stats.ortho_group.rvs(x.shape[1], random_state=0)
  assert measure(x @ turn, y @ turn) == pytest.approx(found, abs=1e-10)
  assert measure(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("measure", DISTANCES)
def test_blocks_do_not_change_the_distance(measure, monkeypatch):
  x, y = two_sets()
  whole = measure(x, y)
  for block in (7, 210, 229, 230):
    monkeypatch.setattr(kernel_distance, "BLOCK", block)
    assert measure(x, y) == pytest.approx(whole, abs=1e-10)
  assert measure(x[:-1], y) != pytest.approx(whole, rel=1e-6)


def test_subsets_have_the_rows_of_the_smaller_set_if_it_has_fewer():
  x, y = two_sets(n=300, m=40)
  found = kid(x, y, num_subsets=5)
  assert found["subset_size"] == 40
  whole = kid(x[:40], y, num_subsets=5)
  assert whole["mean"] == pytest.approx(polynomial_mmd(x[:40], y), rel=1e-10)
  assert whole["std"] < 1e-12
  assert kid(x, y, 5, subset_size=30)["subset_size"] == 30


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
