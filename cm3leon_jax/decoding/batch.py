"""Batches: the arrays of a few requests, with prompts and shared prefixes that occur once."""

# B samples of a batch, S guidance streams, R = B x S rows, U unique prompts, M parts of a plan,
# I tokens of an image, P slots of padded prompts; U0 and P0 are those of shared prefixes.

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jaxtyping import Bool, Float32, Int32, UInt32
import numpy as np

from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling import SamplingConfig, SamplingValues

BUCKET = 32  # Prompt slots are a multiple of it: prompts of similar length share one program.
SHARED = 64  # A shared prefix of fewer tokens is not worth a pass of its own.
Array = jax.Array | np.ndarray


class Prompts(NamedTuple):
  """Left-padded prompts without their last tokens, split into shared prefixes and rests.

  Attributes:
    prefixes: ids, and which of them are no padding; None if no prompts share a prefix.
    rests: ids, and which of them are no padding.
    prefix_of: prefix before each rest.
    row: unique prompt of each row; the streams of a sample are adjacent.
    last: last token of each row's prompt.
  """

  prefixes: tuple[Int32[Array, "U0 P0"], Bool[Array, "U0 P0"]] | None
  rests: tuple[Int32[Array, "U P"], Bool[Array, "U P"]]
  prefix_of: Int32[Array, " U"]
  row: Int32[Array, " R"]
  last: Int32[Array, " R"]

  @property
  def slots(self) -> int:
    """Cache slots of prefixes and rests together."""
    return self.rests[0].shape[1] + (0 if self.prefixes is None else self.prefixes[0].shape[1])


class Control(NamedTuple):
  """How B samples are generated.

  Attributes:
    plan: of `grammar.plan_array`.
    guidance: weights of the streams at each code of an image, then at text.
    seeds: a sample depends on its own seed only.
    contrastive: samples that use contrastive decoding.
    values: settings of the sampler that may change without compiling again.
  """

  plan: Int32[Array, "B M 3"]
  guidance: Float32[Array, "B I+1 S"]
  seeds: UInt32[Array, " B"]
  contrastive: Bool[Array, " B"]
  values: SamplingValues


class Batch(NamedTuple):
  """Arrays of one batch.

  Attributes:
    prompts: of all streams.
    control: how the samples are generated.
    widths: of each stream, the number of last prompt slots that hold all of its prompts.
    longest: largest number of tokens that a sample may have.
  """

  prompts: Prompts
  control: Control
  widths: tuple[int, ...]
  longest: int


def make_batch(
  requests: Sequence[Request],
  seeds: Sequence[int],
  contrastive: Sequence[bool],
  sampling: SamplingConfig,
  *,
  image_tokens: int,
  pad: int,
  multiple: int,
) -> Batch:
  """Makes the arrays of requests that have the same number of streams.

  Some requests are repeated to fill the batch.

  Args:
    requests: one for each sample.
    seeds: of each sample.
    contrastive: samples that use contrastive decoding.
    sampling: how tokens are sampled.
    image_tokens: I.
    pad: id of padding.
    multiple: number of devices that a batch is split over.
  """
  rows = np.arange(rounded(len(requests), multiple)) % len(requests)
  repeated = [requests[i] for i in rows]
  prompts = prompt_arrays([s for r in repeated for s in r.streams], pad, multiple)
  control = Control(
    grammar.plan_array([r.plan for r in repeated]),
    np.stack([r.guidance_weights(sampling, image_tokens) for r in repeated]),
    np.asarray(seeds, np.uint32)[rows],
    np.asarray(contrastive)[rows],
    sampling.values,
  )
  widths = stream_widths(prompts, len(requests[0].streams))
  return Batch(prompts, control, widths, max(grammar.longest(r.plan) for r in requests))


def rounded(count: int, multiple: int) -> int:
  """Returns the number of rows of the program for `count` rows, on `multiple` devices.

  The rows of a device are a power of two up to 8, or a multiple of 8.
  """
  rows = -(-count // multiple)
  return multiple * (1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8)


def pad_left(
  prompts: Sequence[np.ndarray], rows: int, pad: int
) -> tuple[Int32[np.ndarray, "{rows} P"], Bool[np.ndarray, "{rows} P"]]:
  """Pads prompts of unequal length on the left.

  Returns:
    (ids, which of them are no padding). P is a multiple of BUCKET; the remaining rows hold only
    padding.
  """
  slots = max(1, -(-max(len(p) for p in prompts) // BUCKET)) * BUCKET
  tokens, valid = np.full((rows, slots), pad, np.int32), np.zeros((rows, slots), bool)
  for row, prompt in enumerate(prompts):
    tokens[row, slots - len(prompt) :] = prompt
    valid[row, slots - len(prompt) :] = True
  return tokens, valid


def shared_prefixes(prompts: Sequence[np.ndarray]) -> list[int]:
  """Returns the number of first tokens that each prompt shares with others: 0, or at least SHARED.

  In lexical order, prompts with a common prefix are adjacent. A group grows as long as its members
  share SHARED tokens.
  """
  order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
  lengths, start = [0] * len(prompts), 0
  while start < len(order):
    first, common, stop = prompts[order[start]], 0, start + 1
    while stop < len(order) and (n := _common(first, prompts[order[stop]])) >= SHARED:
      common = min(common or n, n)
      stop += 1
    for i in order[start:stop]:
      lengths[i] = common
    start = stop
  return lengths


def _common(a, b) -> int:
  """Returns the length of the common prefix."""
  n = min(len(a), len(b))
  differ = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
  return int(differ[0]) if len(differ) else n


def prompt_arrays(rows: Sequence[np.ndarray], pad: int, multiple: int) -> Prompts:
  """Makes the arrays of R prompts, in which equal prompts and shared prefixes occur once.

  Args:
    rows: R prompts of at least one token.
    pad: id of padding.
    multiple: number of devices that a batch is split over.
  """
  number = {}  # Unique prompt -> its row in the arrays.
  row = [number.setdefault(tuple(p[:-1].tolist()), len(number)) for p in rows]
  prompts = [np.array(p, np.int32) for p in number]
  lengths = shared_prefixes(prompts)
  prefix_number = {}
  count = rounded(len(prompts), multiple)
  prefix_of = np.zeros(count, np.int32)
  for i, (p, n) in enumerate(zip(prompts, lengths)):
    prefix_of[i] = prefix_number.setdefault(tuple(p[:n].tolist()), len(prefix_number))
  prefixes = [np.array(p, np.int32) for p in prefix_number]
  return Prompts(
    prefixes=pad_left(prefixes, rounded(len(prefixes), multiple), pad) if any(lengths) else None,
    rests=pad_left([p[n:] for p, n in zip(prompts, lengths)], count, pad),
    prefix_of=prefix_of,
    row=np.array(row, np.int32),
    last=np.array([p[-1] for p in rows], np.int32),
  )


def stream_widths(prompts: Prompts, streams: int) -> tuple[int, ...]:
  """Returns for each stream the number of last prompt slots that hold all of its prompts.

  A stream of short prompts needs no long cache.
  """
  prefixed = np.zeros(len(prompts.prefix_of), bool)
  if prompts.prefixes is not None:
    prefixed = prompts.prefixes[1].any(1)[prompts.prefix_of]
  rests = -(-np.maximum(prompts.rests[1].sum(axis=1), 1) // BUCKET) * BUCKET
  needed = np.where(prefixed, prompts.slots, rests)[prompts.row]
  return tuple(int(n) for n in needed.reshape(-1, streams).max(axis=0))
