import numpy as np
import pytest

from benchmarks import reward_signal


def test_shares_of_groups_in_literals():
  rewards = np.float32([[1, 1], [0, 0], [0, 1], [0, 0]])
  found = reward_signal.shares(list(rewards))
  assert found == {"right": 0.25, "wrong": 0.5, "mixed": 0.25}
  assert reward_signal.shares(list(rewards[2:3])) == {"right": 0, "wrong": 0, "mixed": 1}
  assert reward_signal.shares([np.zeros(2)]) == {"right": 0, "wrong": 1, "mixed": 0}


def test_the_cosine_is_that_of_equal_opposite_and_independent_gradients():
  one = np.random.default_rng(0).normal(size=(8, 1_000))
  assert reward_signal.cosines([one[0]] * 4) == pytest.approx((1, 0))
  assert reward_signal.cosines([one[0], 2 * one[0], -one[0]])[0] == pytest.approx(-1 / 3)
  mean, error = reward_signal.cosines(list(one))
  assert abs(mean) < 3 * error < 0.1
  # With a common part as large as the noise, the cosine is 1/2.
  mean, error = reward_signal.cosines(list(one + np.random.default_rng(1).normal(size=1_000)))
  assert mean == pytest.approx(0.5, abs=0.05)
