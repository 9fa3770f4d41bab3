"""Guidance: the weights of the streams, their schedules, and the sum of their logits."""

# B rows, S guidance streams, I tokens of an image, V vocabulary (or the part of it that is legal).

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
import numpy as np

from cm3leon_jax.decoding.config import SCHEDULES


def combine_streams(
  logits: Float[Array, "S B V"], weights: Float[Array, "#B S"] | Float[Array, " S"]
) -> Float[Array, "B V"]:
  """Combines logits of S streams by weights: classifier-free guidance (sections 3.1, 4.1).

  `training.step.grpo` combines hidden states in the same way, before the head.

    logits = [[[1 2]] [[0 4]]], weights = [3 -2]: [[3 -2]]

  Args:
    logits: finite: illegal ids are masked in the result, since 0 times -inf is NaN.
    weights: of all prompts, or of each; the weights of a prompt sum to 1.

  Returns:
    Logits. With weights (1, 0) they are those of the first stream, unchanged.
  """
  # Not an einsum: on some devices that rounds its inputs to fewer bits.
  return jnp.sum(logits * jnp.atleast_2d(weights).T[:, :, None], axis=0)


def divergence(
  conditional: Float[Array, "*B V"], unconditional: Float[Array, "*B V"]
) -> Float32[Array, "*B"]:
  """Computes KL(conditional || unconditional) in nats: what guidance has to work with.

  It is 0 where a prompt changes nothing, e.g. one that was dropped on its way.

  Args:
    conditional: finite logits of the stream with the prompt.
    unconditional: finite logits of the stream without it.
  """
  p, q = (jax.nn.log_softmax(x, axis=-1) for x in (conditional, unconditional))
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1).astype(jnp.float32)


def scheduled(guidance: float, schedule: str, image_tokens: int) -> Float[np.ndarray, " I"]:
  """Computes the weight of guidance at each code: 1 + (guidance - 1) m; m is the schedule.

    guidance = 3, "linear", 3 codes: [1 2 3]

  Args:
    guidance: the full weight; 1 is the model without guidance.
    schedule: "constant": m is 1. "linear" and "cosine" rise from 0 at the first code to 1 at the
      last, in a straight line or as (1 - cos(pi t)) / 2; the mean of m is 1/2 for both, so the mean
      weight is (1 + guidance) / 2.
    image_tokens: I; with a rising schedule an image of one code is not guided.

  Raises:
    ValueError: another schedule.
  """
  t = np.linspace(0, 1, image_tokens)
  match schedule:
    case "constant":
      m = np.ones_like(t)
    case "linear":
      m = t
    case "cosine":
      m = (1 - np.cos(np.pi * t)) / 2
    case _:
      raise ValueError(f"schedule is '{schedule}'; it must be one of {', '.join(SCHEDULES)}.")
  return 1 + (guidance - 1) * m


def text_to_image_weights(
  guidance: float, schedule: str, image_tokens: int
) -> Float32[np.ndarray, "I 2"]:
  """Returns the weights (alpha, 1 - alpha) of streams c (conditional) and u in u + alpha (c - u).

    guidance = 3, "linear", 3 codes: [[1 0] [2 -1] [3 -2]]

  Args:
    guidance: alpha where the schedule is 1.
    schedule: as in `scheduled`.
    image_tokens: I.
  """
  alpha = scheduled(guidance, schedule, image_tokens)
  return np.stack([alpha, 1 - alpha], axis=1).astype(np.float32)


def editing_weights(
  image_guidance: float, text_guidance: float, schedule: str, image_tokens: int
) -> Float32[np.ndarray, "I 3"]:
  """Returns the weights of streams f (image and instruction), i (image only) and u (neither).

  They sum to u + s_img (i - u) + s_txt (f - i).

    image_guidance = 1.5, text_guidance = 7.5, "linear", 3 codes:
    [[1 0 0] [4.25 -3 -0.25] [7.5 -6 -0.5]]

  Args:
    image_guidance: s_img where the schedule is 1.
    text_guidance: s_txt where the schedule is 1.
    schedule: as in `scheduled`, the same for both; where it is 0, only f counts.
    image_tokens: I.
  """
  image, text = (
    scheduled(guidance, schedule, image_tokens) for guidance in (image_guidance, text_guidance)
  )
  return np.stack([text, image - text, 1 - image], axis=1).astype(np.float32)
