"""Implements classifier-free guidance: weights of streams, schedules, and combined logits."""

# B rows, S guidance streams, I tokens of an image, V vocabulary (all ids, or only image codes).

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
import numpy as np


def combine_streams(
  logits: Float[Array, "S B V"], weights: Float[Array, "#B S"] | Float[Array, " S"]
) -> Float[Array, "B V"]:
  """Returns the weighted sum of the logits of S streams (classifier-free guidance).

  See CM3Leon, sections 3.1 and 4.1. `training.step.grpo` combines hidden states in the same way,
  before the output table.

    logits = [[[1 2]] [[0 4]]], weights = [3 -2]: [[3 -2]]

  Args:
    logits: finite logits. Illegal ids must be masked in the result, since 0 times -inf is NaN.
    weights: weights that sum to 1, for all samples or for each sample.

  Returns:
    Combined logits. With the weights (1, 0), they exactly equal the logits of the first stream.
  """
  # On some devices, an einsum would round its inputs to a lower precision.
  return jnp.sum(logits * jnp.atleast_2d(weights).T[:, :, None], axis=0)


def divergence(
  conditional: Float[Array, "*B V"], unconditional: Float[Array, "*B V"]
) -> Float32[Array, "*B"]:
  """Computes KL(conditional || unconditional) in nats. If it is 0, guidance has no effect.

  A divergence of 0 can mean that the prompt did not reach the model. Both arguments are finite
  logits.
  """
  p, q = (jax.nn.log_softmax(x, axis=-1) for x in (conditional, unconditional))
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1).astype(jnp.float32)


def scheduled(guidance: float, schedule: str, image_tokens: int) -> Float[np.ndarray, " I"]:
  """Computes the guidance weight at each code: 1 + (guidance - 1) m, where m is the schedule.

    guidance = 3, "linear", 3 codes: [1 2 3]

  Args:
    guidance: the full weight; 1 is the model without guidance.
    schedule: with "constant", m is 1. Otherwise let t grow from 0 at the first code to 1 at the
      last code. With "linear", m is t. With "cosine", m is (1 - cos(pi t)) / 2. In both cases the
      mean of m is 1/2, so the mean weight is (1 + guidance) / 2.
    image_tokens: I. With a growing schedule, an image of one code is not guided.
  """
  t = np.linspace(0, 1, image_tokens)
  known = {"constant": np.ones_like(t), "linear": t, "cosine": (1 - np.cos(np.pi * t)) / 2}
  return 1 + (guidance - 1) * known[schedule]


def text_to_image_weights(
  guidance: float, schedule: str, image_tokens: int
) -> Float32[np.ndarray, "I 2"]:
  """Returns the weights (alpha, 1 - alpha) of the conditional and unconditional stream.

  The combined logits are u + alpha (c - u) for conditional logits c and unconditional logits u.
  `guidance` is alpha where the schedule is 1.

    guidance = 3, "linear", 3 codes: [[1 0] [2 -1] [3 -2]]
  """
  alpha = scheduled(guidance, schedule, image_tokens)
  return np.stack([alpha, 1 - alpha], axis=1).astype(np.float32)


def editing_weights(
  image_guidance: float, text_guidance: float, schedule: str, image_tokens: int
) -> Float32[np.ndarray, "I 3"]:
  """Returns the weights of streams f (image and instruction), i (image only) and u (neither).

  The combined logits are u + s_img (i - u) + s_txt (f - i). `image_guidance` is s_img and
  `text_guidance` is s_txt where the schedule is 1. Where the schedule is 0, only f has a weight.

    image_guidance = 1.5, text_guidance = 7.5, "linear", 3 codes:
    [[1 0 0] [4.25 -3 -0.25] [7.5 -6 -0.5]]
  """
  image, text = (
    scheduled(guidance, schedule, image_tokens) for guidance in (image_guidance, text_guidance)
  )
  return np.stack([text, image - text, 1 - image], axis=1).astype(np.float32)
