from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from benchmarks import scaling_fit
from benchmarks.scaling_fit import Law

FLOPS = np.array([1, 2, 4, 8]) * 1e12
LAST = 16e12


def law(floor, scale, exponent, reference=1e12):
  return Law(reference, *map(np.float64, (floor, scale, exponent)))


def test_a_law_in_literals():
  of = law(1, 4, 0.5, reference=100)
  assert (of.bits(100), of.bits(400), of.flops(3)) == (5, 3, 400)
  assert of.flops(1) == of.flops(0.5) == np.inf


def test_a_law_that_rises_needs_no_flops_or_has_never_enough():
  of = law(0, 4, -0.5, reference=100)
  assert of.bits(400) == 8
  assert (of.flops(5), of.flops(3)) == (0, np.inf)


@given(st.floats(0.5, 200), st.floats(-0.8, 0.8))
def test_the_fit_recovers_a_power_law(scale, exponent):
  made = law(0, scale, exponent)
  found = scaling_fit.fit(FLOPS, made.bits(FLOPS))
  np.testing.assert_allclose(found.bits(LAST), made.bits(LAST), rtol=1e-9)
  np.testing.assert_allclose(found.exponent, exponent, atol=1e-9)
  assert not scaling_fit.needs_floor(FLOPS, made.bits(FLOPS))


@given(st.floats(0.5, 20), st.floats(2, 20), st.floats(0.3, 0.8))
def test_the_fit_recovers_a_law_with_a_floor(floor, scale, exponent):
  made = law(floor, scale, exponent)
  found = scaling_fit.fit(FLOPS, made.bits(FLOPS), with_floor=True)
  np.testing.assert_allclose(found.bits(LAST), made.bits(LAST), rtol=1e-5)
  np.testing.assert_allclose(found.floor, floor, rtol=1e-3)


def test_a_floor_is_taken_where_the_largest_size_needs_it():
  """The fit needs a floor: without a floor, the prediction for the fifth size is too low."""
  bits = law(3, 4, 0.4).bits(FLOPS)
  np.testing.assert_allclose(bits, [7, 6.0314, 5.2974, 4.7411], atol=1e-4)
  assert scaling_fit.needs_floor(FLOPS, bits)
  assert not scaling_fit.needs_floor(FLOPS[:3], bits[:3])
  fifth = law(3, 4, 0.4).bits(LAST)
  assert scaling_fit.fit(FLOPS, bits).bits(LAST) / fifth - 1 < -0.02


def test_bits_that_rise_get_no_floor():
  assert not scaling_fit.needs_floor(FLOPS, [5, 5.1, 5.4, 6.2])


def test_many_laws_are_fitted_as_each_alone():
  rng = np.random.default_rng(0)
  bits = law(2, 5, 0.5).bits(FLOPS) * np.exp(rng.normal(0, 0.01, (6, 4)))
  for floor in (False, True):
    many = scaling_fit.fit(FLOPS, bits, floor)
    each = [scaling_fit.fit(FLOPS, row, floor).bits(LAST) for row in bits]
    np.testing.assert_allclose(many.bits(LAST), each, rtol=1e-12)


@pytest.mark.parametrize("of", ["without", "neighbors"])
def test_the_ratio_of_laws_that_differ_by_a_factor_of_flops(of):
  """With retrieval, any loss needs a fifth of the FLOPs, so the ratio is 5."""
  without, neighbors = law(1, 4, 0.5), law(1, 4, 0.5, reference=0.2e12)
  found = scaling_fit.ratio(without, neighbors, (1e12, 16e12), of)
  np.testing.assert_allclose(found["ratio"], 5)
  assert found["bits"] == pytest.approx(2 if of == "without" else 1 + 4 / np.sqrt(80))
  equal = scaling_fit.ratio(without, without, (1e12, 16e12), of)
  np.testing.assert_allclose(equal["ratio"], 1)


def test_the_ratio_of_bits_that_are_never_reached():
  rising, neighbors = law(0, 8, -0.1), law(0, 8, 0.5)
  found = scaling_fit.ratio(rising, neighbors, (1e12, 16e12), "neighbors")
  assert (found["bits"], found["ratio"]) == (2, np.inf)
  # Without neighbors the loss rises with the FLOPs, so the smallest run is the best, with 8 bits.
  found = scaling_fit.ratio(rising, neighbors, (1e12, 16e12), "without")
  assert (found["bits"], found["ratio"]) == (8, 16)


def test_bounds():
  found = [scaling_fit.bound(x, (1, 16)) for x in (0.5, 1, 16, 17, np.inf)]
  assert found == ["below", None, None, "above", "above"]


def test_documents_of_a_group_and_seeds_of_a_size_are_resampled():
  rng = np.random.default_rng(0)
  groups = ["a", "a", "b"]
  one, two = [[1, 1, 4]], [[0, 0, 0], [1, 1, 1]]
  means = scaling_fit.resampled_means([np.array(one), np.array(two)], groups, rng, 200)
  assert means.shape == (200, 2)
  assert set(means[:, 0]) == {1, 2, 4}
  assert set(means[:, 1]) == {0, 0.5, 1}


def test_sizes_share_the_resampled_documents():
  values = np.random.default_rng(1).random((1, 20))
  means = scaling_fit.resampled_means(
    [values, 3 * values], np.arange(20), np.random.default_rng(0), 50
  )
  np.testing.assert_allclose(means[:, 1], 3 * means[:, 0])
  assert means[:, 0].std() > 0


def test_an_interval_may_have_infinite_ends():
  assert scaling_fit.interval(np.arange(999.0)) == (24, 974)
  assert scaling_fit.interval(np.r_[np.ones(900), np.full(100, np.inf)]) == (1, np.inf)
