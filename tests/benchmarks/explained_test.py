import numpy as np
import pytest

from benchmarks.evidence import explained


def test_copies_are_blocks_at_any_place_that_are_not_all_equal():
  document = np.arange(64).reshape(8, 8)
  codes = np.full((8, 8), 99)
  codes[1:5, 2:5] = document[4:8, 5:8]  # Moved.
  codes[6:8, 6:8] = document[6:8, 6:8]  # Only 2 x 2 codes.
  found = explained.copied(codes, document)
  expected = np.zeros((8, 8), bool)
  expected[1:5, 2:5] = True
  np.testing.assert_array_equal(found, expected)
  background = np.full((8, 8), 7)
  assert not explained.copied(background, background).any()
  background[2, 2] = 8
  assert explained.copied(background, background)[:5, :5].all()  # Blocks with the 8.


def test_precision_and_recall_in_literals():
  named = [np.array([[True, True], [False, False]]), np.zeros((2, 2), bool)]
  truth = [np.array([[True, False], [False, True]]), np.array([[True, False], [False, False]])]
  found = explained.measured(named, truth, np.array([0, 1]))
  assert found["precision"]["mean"] == 0.5
  assert found["recall"]["mean"] == pytest.approx(1 / 3)
  assert found["named"] == 0.25
  nothing = [np.zeros((2, 2), bool)] * 2
  assert explained.measured(nothing, truth, np.array([0, 1]))["precision"] is None
