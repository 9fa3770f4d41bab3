"""Collects the arrays that control sampling: plans, guidance weights, seeds and settings."""

# B samples, S guidance streams, I tokens of an image, M parts of a plan.

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
from jaxtyping import Bool, Float32, Int32, UInt32
import numpy as np

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling.rows import SamplingValues

Array: TypeAlias = jax.Array | np.ndarray


class Control(NamedTuple):
  """Arrays that control how B samples are generated.

  Attributes:
    plan: result of `grammar.plan_array`.
    guidance: weights of the streams at each code of an image; the last entry is for text.
    seeds: seed of each sample. A sample does not depend on the seeds of other samples.
    contrastive: samples that use contrastive decoding, and not top-p.
    values: sampling settings that do not cause recompilation. Each is a scalar for all samples or
      an array with one number per sample.
  """

  plan: Int32[Array, "B M 3"]
  guidance: Float32[Array, "B I+1 S"]
  seeds: UInt32[Array, " B"]
  contrastive: Bool[Array, " B"]
  values: SamplingValues


def control_of(
  requests: Sequence[Request],
  seeds: Sequence[int],
  contrastive: Sequence[bool],
  sampling: SamplingConfig,
  image_tokens: int,
  parts: int = 0,
) -> Control:
  """Makes the control of B requests with the same number of streams.

  `requests`, `seeds` and `contrastive` have one element per sample. `sampling` applies to all
  samples, so `values` are scalars. `parts` is M; 0 means as many parts as the plans need.
  """
  return Control(
    grammar.plan_array([request.plan for request in requests], parts),
    np.stack([request.guidance_weights(sampling, image_tokens) for request in requests]),
    np.asarray(seeds, np.uint32),
    np.asarray(contrastive, bool),
    SamplingValues.of(sampling),
  )


def without_samples(
  rows: int, streams: int, sampling: SamplingConfig, image_tokens: int, parts: int
) -> Control:
  """Makes the control of rows without samples: all plans are DONE.

  `values` have one number per row.
  """
  return Control(
    np.zeros((rows, parts, 3), np.int32),
    np.zeros((rows, image_tokens + 1, streams), np.float32),
    np.zeros(rows, np.uint32),
    np.zeros(rows, bool),
    SamplingValues(*(np.repeat(x, rows) for x in SamplingValues.of(sampling))),
  )


def put_sample(control: Control, row: int, sample: Control) -> None:
  """Writes the control of one sample (from `control_of`) to a row of `without_samples`."""
  of_all: list[np.ndarray] = jax.tree.leaves(control)
  of_sample: list[np.ndarray] = jax.tree.leaves(sample)
  for into, x in zip(of_all, of_sample, strict=True):
    into[row] = np.reshape(x, into.shape[1:])
