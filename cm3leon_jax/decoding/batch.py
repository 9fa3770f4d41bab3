"""Converts requests to the arrays of a batch, in which equal prompts and prefixes occur once."""

# B samples of a batch, S guidance streams, R = B x S rows, U unique prompts, U0 shared prefixes,
# P entries of a padded prompt, P0 entries of a padded prefix, M parts of a plan, I tokens of an
# image, T tokens of a prompt.

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
from jaxtyping import Bool, Int, Int32
import numpy as np

from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.positions import positions_of
from cm3leon_jax.vocab import VocabLayout

BUCKET = 32  # Padded prompts have a multiple of 32 tokens, so that similar lengths share a program.
SHARED = 64  # A shared prefix of fewer tokens is not worth a separate prefill pass.
Array: TypeAlias = jax.Array | np.ndarray
Tokens: TypeAlias = Int32[np.ndarray, "_ 2"]  # (id, position): attention keys depend on both.


class StreamPrompt(NamedTuple):
  """The prompt of one stream.

  Attributes:
    tokens: all tokens except the last; prefill reads them.
    last: id of the last token; the first decoding step reads it.
    next_position: position of the first generated token.
  """

  tokens: Tokens
  last: int
  last_position: int
  next_position: int

  @classmethod
  def of(cls, ids: Int[np.ndarray, " T"], positions: Int[np.ndarray, " T+1"]) -> "StreamPrompt":
    """Splits a prompt of at least one token; `positions` are from `prompt_positions`."""
    tokens = np.stack([ids[:-1], positions[:-2]], axis=1).astype(np.int32)
    return cls(tokens, int(ids[-1]), int(positions[-2]), int(positions[-1]))


class Padded(NamedTuple):
  """Left-padded tokens.

  Attributes:
    valid: False at padding.
    positions: positions of the tokens in their samples; 0 at padding.
  """

  ids: Int32[Array, "U P"]
  valid: Bool[Array, "U P"]
  positions: Int32[Array, "U P"]


class Prompts(NamedTuple):
  """Left-padded prompts without their last tokens, split into shared prefixes and remainders.

  Attributes:
    prefixes: shared prefixes [U0, P0]; None if no prompts share a prefix.
    rests: the remaining tokens [U, P] of each unique prompt.
    prefix_of: index of the prefix before each rest, in the same shard of the batch as the rest.
    row: index of the unique prompt of each row, in the same shard of the batch as the row. The
      streams of a sample are adjacent rows.
    last, last_positions, next_positions: as in `StreamPrompt`.
  """

  prefixes: Padded | None
  rests: Padded
  prefix_of: Int32[Array, " U"]
  row: Int32[Array, " R"]
  last: Int32[Array, " R"]
  last_positions: Int32[Array, " R"]
  next_positions: Int32[Array, " R"]

  @property
  def entries(self) -> int:
    """Number of cache entries that a prefix and its rest take together."""
    prefixes = 0 if self.prefixes is None else self.prefixes.ids.shape[1]
    return self.rests.ids.shape[1] + prefixes


class Batch(NamedTuple):
  """Arrays of one batch."""

  prompts: Prompts
  control: Control


def rounded(count: int, multiple: int) -> int:
  """Rounds a number of rows up to the batch size of a compiled program on `multiple` devices.

  The number of rows per device is 1, 2, 4 or a multiple of 8.
  """
  rows = -(-count // multiple)
  return multiple * (1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8)


def prompt_positions(
  prompt: Int32[np.ndarray, " T"], plan: Sequence[grammar.Part], vocab: VocabLayout,
  align_images: bool,
) -> Int32[np.ndarray, " T+1"]:  # fmt: skip
  """Returns the positions of a prompt's tokens and of the first generated token.

  Aligned positions depend on where an image starts. So if the plan has CODES, the prompt gets the
  positions that it has in a training sample with an image code after the prompt. In a DOCUMENT, the
  lengths of the texts are unknown, so its generated images are not aligned.

    prompt </s> 7 <break>, CODES   aligned  -3 -2 -1 0
  """
  if any(part.kind == grammar.CODES for part in plan):
    return positions_of(np.append(prompt, vocab.image_ids(0)), vocab, align_images)
  positions = positions_of(prompt, vocab, align_images)
  return np.append(positions, positions[-1] + 1)


def bucket_length(length: int) -> int:
  """Rounds a length up to a positive multiple of BUCKET."""
  return max(1, -(-length // BUCKET)) * BUCKET


def prompts_of(request: Request, vocab: VocabLayout, align_images: bool) -> list[StreamPrompt]:
  """Returns the prompts of a request's streams, with positions from `prompt_positions`."""
  return [
    StreamPrompt.of(prompt, prompt_positions(prompt, request.plan, vocab, align_images))
    for prompt in request.streams
  ]


def pad_left(prompts: Sequence[Tokens], pad: int, length: int = 0) -> Padded:
  """Pads prompts on the left to `length`. 0 means the `bucket_length` of the longest prompt."""
  length = length or bucket_length(max(len(p) for p in prompts))
  shape = (len(prompts), length)
  ids, valid = np.full(shape, pad, np.int32), np.zeros(shape, bool)
  positions = np.zeros(shape, np.int32)
  for row, prompt in enumerate(prompts):
    place = np.s_[row, length - len(prompt) :]
    ids[place], positions[place] = prompt.T
    valid[place] = True
  return Padded(ids, valid, positions)


def shared_prefixes(prompts: Sequence[Tokens]) -> list[int]:
  """Returns, for each prompt, the length of the prefix that it shares with other prompts.

  The length is 0 or at least SHARED. Shared tokens have equal ids and equal positions. Prompts are
  sorted, so that prompts with a common prefix are adjacent. A prompt joins the current group if it
  shares at least SHARED tokens with the group's first prompt.
  """
  order = sorted(range(len(prompts)), key=lambda i: prompts[i].tolist())
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


def _common(a: Tokens, b: Tokens) -> int:
  """Returns the length of the common prefix of two prompts."""
  n = min(len(a), len(b))
  differ = np.flatnonzero((a[:n] != b[:n]).any(axis=1))
  return int(differ[0]) if len(differ) else n


def prompt_arrays(read: Sequence[StreamPrompt], pad: int, shards: int) -> Prompts:
  """Makes the arrays of R prompts. Equal prompts on the same device occur once.

  A prompt or shared prefix that several devices need is read on each of them. This takes less time
  than sending its keys and values. `shards` is the number of devices over which the batch is
  sharded. It must divide R.
  """
  size = len(read) // shards
  row, prompts = _unique_of_shards(
    [[p.tokens for p in read[i : i + size]] for i in range(0, len(read), size)]
  )
  lengths = [shared_prefixes(of_shard) for of_shard in prompts]
  prefix_of, prefixes = _unique_of_shards(
    [[p[:n] for p, n in zip(*of_shard)] for of_shard in zip(prompts, lengths)]
  )
  rests = [p[n:] for of_shard in zip(prompts, lengths) for p, n in zip(*of_shard)]
  return Prompts(
    prefixes=pad_left([p for of_shard in prefixes for p in of_shard], pad)
    if any(map(any, lengths))
    else None,
    rests=pad_left(rests, pad),
    prefix_of=prefix_of,
    row=row,
    last=np.array([p.last for p in read], np.int32),
    last_positions=np.array([p.last_position for p in read], np.int32),
    next_positions=np.array([p.next_position for p in read], np.int32),
  )


def _unique_of_shards(
  shards: Sequence[Sequence[Tokens]],
) -> tuple[Int32[np.ndarray, " _"], list[list[Tokens]]]:
  """Finds the unique prompts of each shard.

  Appends empty prompts until all shards have the same number of prompts (see `rounded`). Returns
  (index of each prompt in the unique prompts of all shards, unique prompts of each shard).
  """
  result = [_unique(prompts) for prompts in shards]
  count = rounded(max(len(unique) for _, unique in result), 1)
  numbers = np.concatenate([i * count + numbers for i, (numbers, _) in enumerate(result)])
  empty = np.zeros((0, 2), np.int32)
  return numbers, [[*unique, *[empty] * (count - len(unique))] for _, unique in result]


def _unique(prompts: Sequence[Tokens]) -> tuple[Int32[np.ndarray, " _"], list[Tokens]]:
  """Returns (index of each prompt in the unique prompts, unique prompts in order of appearance)."""
  numbers: dict[bytes, int] = {}
  unique: list[Tokens] = []
  for prompt in prompts:
    if numbers.setdefault(prompt.tobytes(), len(unique)) == len(unique):
      unique.append(prompt)
  return np.array([numbers[prompt.tobytes()] for prompt in prompts], np.int32), unique


def stream_widths(prompts: Prompts, streams: int) -> tuple[int, ...]:
  """Returns, for each stream, the number of prompt entries that its cache must keep.

  The cache keeps the last entries, since prompts are padded on the left. A stream with short
  prompts gets a short cache.
  """
  prefixed = np.zeros(len(prompts.prefix_of), bool)
  if prompts.prefixes is not None:
    prefixed = np.any(prompts.prefixes.valid, axis=1)[prompts.prefix_of]
  rests = -(-np.maximum(prompts.rests.valid.sum(axis=1), 1) // BUCKET) * BUCKET
  needed = np.where(prefixed, prompts.entries, rests)[prompts.row]
  return tuple(int(n) for n in needed.reshape(-1, streams).max(axis=0))
