from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest
from scipy.spatial import distance

from cm3leon_jax.evaluation.metrics.code_histograms import jensen_shannon_bits

COUNTS = hnp.arrays(np.int64, 6, elements=st.integers(0, 10**6)).filter(lambda x: x.any())


def test_values_are_those_of_the_docstrings():
  assert jensen_shannon_bits([3, 1], [1, 3]) == pytest.approx(0.189, abs=5e-4)
  assert jensen_shannon_bits([5, 0, 2, 0], [0, 1, 0, 9]) == 1.0


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
