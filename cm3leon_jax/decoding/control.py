"""How samples are generated: the arrays of plans, guidance, seeds and settings of their rows."""

# B samples, S guidance streams, I tokens of an image, M parts of a plan.

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
from jaxtyping import Float32, Int32, UInt32
import numpy as np

from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling.method import TokenMethod
from cm3leon_jax.decoding.sampling.rows import SamplingValues, Uses, uses_of
from cm3leon_jax.decoding.sampling.top_p import TOP_P

Array: TypeAlias = jax.Array | np.ndarray


class Control(NamedTuple):
  """How B samples are generated.

  Attributes:
    plan: of `grammar.plan_array`.
    guidance: weights of the streams at each code of an image, then at text.
    seeds: a sample depends on its own seed only.
    uses: by the name of each sampling method but top-p: samples that use it.
    values: settings of sampling that may change without compiling again, of all samples or of each.
  """

  plan: Int32[Array, "B M 3"]
  guidance: Float32[Array, "B I+1 S"]
  seeds: UInt32[Array, " B"]
  uses: Uses
  values: SamplingValues


def control_of(
  requests: Sequence[Request],
  seeds: Sequence[int],
  methods: Sequence[TokenMethod],
  sampling: SamplingConfig,
  image_tokens: int,
  parts: int = 0,
) -> Control:
  """Makes the arrays of B requests with the same number of streams; `values` are of all samples.

  Args:
    requests: one for each sample.
    seeds: of each sample.
    methods: by which each sample is sampled.
    sampling: settings of all samples.
    image_tokens: I.
    parts: M; default: as many as the plans need.
  """
  return Control(
    grammar.plan_array([request.plan for request in requests], parts),
    np.stack([request.guidance_weights(sampling, image_tokens) for request in requests]),
    np.asarray(seeds, np.uint32),
    uses_of(methods),
    SamplingValues.of(sampling),
  )


def without_samples(
  rows: int, streams: int, sampling: SamplingConfig, image_tokens: int, parts: int
) -> Control:
  """Makes the arrays of `rows` rows whose plans are DONE; each has `values` of its own."""
  return Control(
    np.zeros((rows, parts, 3), np.int32),
    np.zeros((rows, image_tokens + 1, streams), np.float32),
    np.zeros(rows, np.uint32),
    uses_of([TOP_P] * rows),
    SamplingValues(*(np.repeat(x, rows) for x in SamplingValues.of(sampling))),
  )


def put_sample(control: Control, row: int, sample: Control) -> None:
  """Writes the control of one sample, of `control_of`, into a row of `without_samples`."""
  of_all: list[np.ndarray] = jax.tree.leaves(control)
  of_sample: list[np.ndarray] = jax.tree.leaves(sample)
  for into, x in zip(of_all, of_sample, strict=True):
    into[row] = np.reshape(x, into.shape[1:])
