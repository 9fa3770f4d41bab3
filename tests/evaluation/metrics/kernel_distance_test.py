import tracemalloc

import numpy as np
import pytest
from scipy import stats
from scipy.spatial import distance

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import kernel_distance
from cm3leon_jax.evaluation.metrics.kernel_distance import cmmd, kid, polynomial_mmd
from tests.refusals import refused

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


def test_cmmd_counts_pairs_of_a_row_with_itself():
  x, y = two_sets()

  def mean_kernel(a, b):
    return np.exp(-distance.cdist(unit(a), unit(b), "sqeuclidean") / 200).mean()

  expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
  assert expected > 0.05
  assert cmmd(x, y) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("measure", DISTANCES)
@pytest.mark.parametrize("seed", range(3))
def test_properties_of_the_distances(measure, seed):
  x, y = two_sets(seed)
  found = measure(x, y)
  assert found > 0.05
  assert measure(y, x) == pytest.approx(found, abs=1e-10)
  assert measure(x[::-1], y) == pytest.approx(found, abs=1e-10)
  turn = stats.ortho_group.rvs(x.shape[1], random_state=seed)
  assert measure(x @ turn, y @ turn) == pytest.approx(found, abs=1e-10)
  assert measure(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(found, rel=1e-4)


def test_a_set_has_no_distance_to_itself():
  x = two_sets()[0]
  assert 0 <= cmmd(x, x[::-1]) < 1e-10
  # The estimate is unbiased and therefore negative here: only the sum between the sets contains
  # pairs of equal rows.
  assert polynomial_mmd(x, x) < 0
  halves = polynomial_mmd(x[::2], x[1::2])
  assert abs(halves) < 0.2 * polynomial_mmd(*two_sets())


def test_lengths_of_rows_do_not_change_cmmd():
  x, y = two_sets()
  lengths = np.random.default_rng(1).uniform(0.1, 10, (len(x), 1))
  assert cmmd(x * lengths, 5 * y) == pytest.approx(cmmd(x, y), abs=1e-10)
  assert cmmd(x + 0.1, y) != pytest.approx(cmmd(x, y), abs=1e-3)


@pytest.mark.parametrize("measure", DISTANCES)
def test_blocks_do_not_change_the_distance(measure, monkeypatch):
  x, y = two_sets()
  whole = measure(x, y)
  for block in (7, 210, 229, 230):
    monkeypatch.setattr(kernel_distance, "BLOCK", block)
    assert measure(x, y) == pytest.approx(whole, abs=1e-10)
  assert measure(x[:-1], y) != pytest.approx(whole, rel=1e-6)


def test_the_polynomial_distance_is_unbiased():
  rng = np.random.default_rng(0)
  found = [polynomial_mmd(*rng.normal(size=(2, 20, 4))) for _ in range(400)]
  assert abs(np.mean(found)) < 3 * np.std(found) / 20
  biased = [
    polynomial_mmd(x, y) + sum(((z * z).sum(1) / 4 + 1).mean() ** 3 / 20 for z in (x, y))
    for x, y in rng.normal(size=(100, 2, 20, 4))
  ]
  assert np.mean(biased) > 5 * np.std(biased) / 10


@pytest.mark.slow
def test_memory_is_that_of_a_block_and_not_of_all_pairs():
  n, width = 6_000, 32
  x, y = two_sets(n=n, m=n, width=width)
  x, y = x.astype(np.float32), y.astype(np.float32)
  tracemalloc.start()
  cmmd(x, y)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 0.2 * n * n * 8


def test_subsets_have_the_rows_of_the_smaller_set_if_it_has_fewer():
  x, y = two_sets(n=300, m=40)
  found = kid(x, y, num_subsets=5)
  assert found["subset_size"] == 40
  whole = kid(x[:40], y, num_subsets=5)
  assert whole["mean"] == pytest.approx(polynomial_mmd(x[:40], y), rel=1e-10)
  assert whole["std"] < 1e-12
  assert kid(x, y, 5, subset_size=30)["subset_size"] == 30


def test_subsets_depend_on_the_seed_alone():
  x, y = two_sets()
  one, same, other = (kid(x, y, 5, 50, seed) for seed in (1, 1, 2))
  assert one == same
  assert one["mean"] != other["mean"]


def test_more_subsets_estimate_the_distance_of_all_rows():
  x, y = two_sets()
  found = kid(x, y, num_subsets=100, subset_size=50)
  assert found["mean"] == pytest.approx(polynomial_mmd(x, y), abs=3 * found["std"] / 10)


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


@pytest.mark.parametrize(
  ("measure", "first", "second"),
  [
    (polynomial_mmd, [[1, 2]], [[1, 2], [3, 4]]),
    (kid, [[1, 2], [3, 4]], np.zeros((0, 2))),
    (cmmd, np.zeros((0, 2)), [[1, 2]]),
    (cmmd, [[1, 2]], [[1, 2], [0, 0]]),
    (cmmd, [[1, 2]], [[1, 2, 3]]),
    (polynomial_mmd, [[1, 2], [1, np.nan]], [[1, 2], [3, 4]]),
  ],
)
def test_sets_that_cannot_be_compared_are_refused(measure, first, second):
  with refused(UserError):
    measure(first, second)


def test_subsets_of_one_image_are_refused():
  with refused(UserError):
    kid(*two_sets(), subset_size=1)
