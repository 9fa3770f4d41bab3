"""Classifier-free guidance: the weight of each stream at each code of an image, and the sum (CM3Leon, sections 3.1, 4.1)."""

# S guidance streams, B prompts, V vocabulary (or the rows of it that are legal), I image tokens.

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = get_args(Schedule)


def combine_streams(logits, weights):
  """Weighs the logits of S guidance streams into one.

    logits = [[[1 2]] [[0 4]]], weights = [3 -2]: [[3 -2]]

  Args:
    logits: [S, B, V] fp32, finite: illegal ids are masked in the result, since 0 times -inf is no number.
    weights: [S], or [B, S] where prompts differ; those of a prompt sum to 1.

  Returns:
    [B, V] fp32. With weights (1, 0) it is the first stream, unchanged.
  """
  # Not an einsum: on some devices that rounds its inputs to fewer bits.
  return jnp.sum(logits * jnp.atleast_2d(weights).T[:, :, None], axis=0)


def scheduled(guidance: float, schedule: str, image_tokens: int) -> np.ndarray:
  """Weight of guidance at each code, 1 + (guidance - 1) m: m is the schedule, and 1 the model without guidance.

    guidance = 3, "linear", 3 codes: [1 2 3]

  Args:
    guidance: the full weight.
    schedule: "constant": m is 1. "linear" and "cosine" rise from 0 at the first code to 1 at the last, in a straight line or
      as (1 - cos(pi t)) / 2; the mean of m is 1/2 for both, so the mean weight is (1 + guidance) / 2.
    image_tokens: I; with a rising schedule an image of one code is not guided.

  Returns:
    [I] fp64.

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


def text_to_image_weights(guidance: float, schedule: str, image_tokens: int) -> np.ndarray:
  """Weights of the conditional stream c and the unconditional u in u + alpha (c - u): (alpha, 1 - alpha).

    guidance = 3, "linear", 3 codes: [[1 0] [2 -1] [3 -2]]

  Args:
    guidance: alpha where the schedule is 1.
    schedule: as in `scheduled`.
    image_tokens: I.

  Returns:
    [I, 2] fp32.
  """
  alpha = scheduled(guidance, schedule, image_tokens)
  return np.stack([alpha, 1 - alpha], axis=1).astype(np.float32)


def editing_weights(
  image_guidance: float, text_guidance: float, schedule: str, image_tokens: int
) -> np.ndarray:
  """Weights of the streams f (image and instruction), i (image only) and u (neither) in u + s_img (i - u) + s_txt (f - i).

    image_guidance = 1.5, text_guidance = 7.5, "linear", 3 codes: [[1 0 0] [4.25 -3 -0.25] [7.5 -6 -0.5]]

  Args:
    image_guidance: s_img where the schedule is 1.
    text_guidance: s_txt, likewise.
    schedule: as in `scheduled`, the same for both; where it is 0, f stands alone.
    image_tokens: I.

  Returns:
    [I, 3] fp32.
  """
  image, text = (
    scheduled(guidance, schedule, image_tokens) for guidance in (image_guidance, text_guidance)
  )
  return np.stack([text, image - text, 1 - image], axis=1).astype(np.float32)
