from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest
from scipy.spatial import distance

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics.code_histograms import jensen_shannon_bits, total_variation
from tests.refusals import refused

DISTANCES = [jensen_shannon_bits, total_variation]
COUNTS = hnp.arrays(np.int64, 6, elements=st.integers(0, 10**6)).filter(lambda x: x.any())


def test_values_are_those_of_the_docstrings():
  assert jensen_shannon_bits([3, 1], [1, 3]) == pytest.approx(0.189, abs=5e-4)
  assert total_variation([3, 1], [1, 3]) == 0.5


@given(COUNTS, COUNTS)
def test_properties_of_the_distances(first, second):
  for measure in DISTANCES:
    found = measure(first, second)
    assert 0 <= found <= 1
    assert measure(first, 3 * first) == pytest.approx(0, abs=1e-15)
    assert measure(second, first) == pytest.approx(found, abs=1e-15)
    assert measure(first[::-1], second[::-1]) == pytest.approx(found, abs=1e-14)
    assert measure(np.append(first, 0), np.append(second, 0)) == pytest.approx(found, abs=1e-14)
  # Pinsker's inequality, and an upper bound of this divergence by the total variation.
  variation, bits = total_variation(first, second), jensen_shannon_bits(first, second)
  assert variation**2 / (2 * np.log(2)) - 1e-12 <= bits <= variation + 1e-12


@pytest.mark.parametrize("measure", DISTANCES)
def test_sets_that_share_no_code_differ_by_1(measure):
  assert measure([5, 0, 2, 0], [0, 1, 0, 9]) == 1.0


@given(COUNTS, COUNTS)
def test_the_divergence_is_that_of_scipy_and_of_entropies(first, second):
  found = jensen_shannon_bits(first, second)
  p, q = first / first.sum(), second / second.sum()

  def entropy(shares):
    return -sum(x * np.log2(x) for x in shares if x > 0)

  assert found == pytest.approx(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, abs=1e-12)
  if found > 1e-9:  # SciPy returns NaN where rounding makes the value negative.
    root = distance.jensenshannon(first, second, base=2)
    assert found == pytest.approx(root**2, abs=1e-12)
    assert found != pytest.approx(root, abs=1e-12) or found > 1 - 1e-9


def test_samples_of_one_distribution_differ_by_the_chance_of_the_docstring():
  rng = np.random.default_rng(0)
  shares = rng.dirichlet(np.full(64, 5.0))
  found = [
    jensen_shannon_bits(rng.multinomial(4_000, shares), rng.multinomial(9_000, shares))
    for _ in range(200)
  ]
  chance = 63 * (1 / 4_000 + 1 / 9_000) / (8 * np.log(2))
  assert np.mean(found) == pytest.approx(chance, rel=0.05)


def test_arrangement_is_not_seen():
  codes = np.random.default_rng(0).integers(0, 32, (10, 8, 8))
  counts = [np.bincount(x.ravel(), minlength=32) for x in (codes, codes[:, ::-1].swapaxes(1, 2))]
  assert [measure(*counts) for measure in DISTANCES] == [0.0, 0.0]


@pytest.mark.parametrize("measure", DISTANCES)
def test_histograms_that_cannot_be_compared_are_refused(measure):
  with refused(UserError):
    measure([1, 2], [1, 2, 3])
  for wrong in ([0, 0], [2, -1]):
    with refused(UserError):
      measure([1, 2], wrong)
