from typing import get_args

import jax
import numpy as np
import pytest

from cm3leon_jax.config.sampling import Schedule
from cm3leon_jax.decoding.sampling import guidance
from cm3leon_jax.decoding.sampling.guidance import (
  editing_weights,
  scheduled,
  text_to_image_weights,
)

RNG = np.random.default_rng(0)
jit_combine = jax.jit(guidance.combine_streams)


def combine_streams(logits, weights):
  return np.asarray(jit_combine(logits, weights))


def test_combine_streams():
  logits = np.float32([[[1, 2]], [[0, 4]]])
  np.testing.assert_array_equal(combine_streams(logits, np.float32([1, 0])), [[1.0, 2.0]])
  np.testing.assert_array_equal(combine_streams(logits, np.float32([3, -2])), [[3.0, -2.0]])


def test_each_prompt_may_have_its_own_weights():
  logits = RNG.normal(size=(3, 4, 5)).astype(np.float32)
  weights = np.float32([[1, 0, 0], [3, -2, 0], [7.5, -6, -0.5], [0, 0, 1]])
  together = combine_streams(logits, weights)
  for row in range(4):
    np.testing.assert_array_equal(together[row], combine_streams(logits, weights[row])[row])
  np.testing.assert_array_equal(together[0], logits[0, 0])
  np.testing.assert_array_equal(together[3], logits[2, 3])
  # Negative control: weights of another prompt.
  assert np.any(together[1] != combine_streams(logits, weights[2])[1])


def test_scheduled():
  np.testing.assert_array_equal(scheduled(3.0, "linear", 3), [1, 2, 3])
  np.testing.assert_array_equal(scheduled(3.0, "constant", 3), [3, 3, 3])


@pytest.mark.parametrize("schedule", get_args(Schedule)[1:])
def test_a_schedule_rises_from_no_guidance_and_has_the_documented_mean(schedule):
  alpha = scheduled(4.0, schedule, 256)
  assert (alpha[0], alpha[-1]) == (1, 4)
  assert (np.diff(alpha) > 0).all()
  assert alpha.mean() == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_weights_are_the_formulas(schedule):
  """Weights give u + alpha (c - u) and u + s_img (i - u) + s_txt (f - i), computed in float64."""
  f, i, u = RNG.normal(size=(3, 2, 6))
  alpha, image = (scheduled(guidance, schedule, 7) for guidance in (5.0, 1.5))
  two, three = text_to_image_weights(5.0, schedule, 7), editing_weights(1.5, 5.0, schedule, 7)
  for step in range(7):
    weighed = [
      combine_streams(np.float32(s), w[step]) for s, w in (([f, u], two), ([f, i, u], three))
    ]
    np.testing.assert_allclose(weighed[0], u + alpha[step] * (f - u), atol=2e-5)
    expected = u + image[step] * (i - u) + alpha[step] * (f - i)
    np.testing.assert_allclose(weighed[1], expected, atol=2e-5)
    # Negative control: weights of the wrong streams. A growing schedule starts with guidance 1,
    # where both are equal.
    if schedule == "constant" or step:
      assert np.abs(weighed[1] - (u + alpha[step] * (i - u) + image[step] * (f - i))).max() > 1e-2
