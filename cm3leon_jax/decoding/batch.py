"""From requests to the arrays of one call: what prompts share is found, padded, and read once."""

# U unique prompts, T tokens.

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.decoding.decode import Prompts

BUCKET = 32  # Prompt slots are a multiple of it, so that prompts of similar length share one compiled program.
SHARED = 64  # A shared beginning of fewer tokens is not worth a pass of its own.


def rounded(count: int, multiple: int) -> int:
  """Rows that a program is compiled for: powers of two up to 8, then multiples of 8; of `multiple` in any case."""
  parts = -(-count // multiple)
  return multiple * (1 << (parts - 1).bit_length() if parts <= 8 else -(-parts // 8) * 8)


def pad_left(prompts: Sequence[np.ndarray], rows: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of unequal length -> ([rows, P] int32 ids, [rows, P] bool: which are real), real ones at the right.

  P is a multiple of BUCKET; rows without a prompt hold padding.
  """
  slots = max(1, -(-max(len(p) for p in prompts) // BUCKET)) * BUCKET
  tokens, valid = np.full((rows, slots), pad, np.int32), np.zeros((rows, slots), bool)
  for row, prompt in enumerate(prompts):
    tokens[row, slots - len(prompt) :] = prompt
    valid[row, slots - len(prompt) :] = True
  return tokens, valid


def shared_prefixes(prompts: Sequence[Sequence[int]]) -> list[int]:
  """For each prompt how many of its first tokens it shares with others: 0, or at least SHARED.

  In lexical order those that share a beginning lie side by side. A group grows as long as its members share SHARED tokens.
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
  n = min(len(a), len(b))
  differ = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
  return int(differ[0]) if len(differ) else n


def prompt_arrays(rows: Sequence[np.ndarray], pad: int, multiple: int) -> Prompts:
  """The prompts of R rows; equal ones are read once, and so is what unequal ones share at their start.

  Args:
    rows: R prompts of at least one token.
    pad: id of padding.
    multiple: devices that a batch is split over.
  """
  unique = {tuple(p[:-1].tolist()): None for p in rows}
  number = {prompt: i for i, prompt in enumerate(unique)}
  prompts = [np.array(p, np.int32) for p in unique]
  lengths = shared_prefixes(prompts)
  prefixes = {tuple(p[:n].tolist()): None for p, n in zip(prompts, lengths)}
  prefix_number = {prefix: i for i, prefix in enumerate(prefixes)}
  count = rounded(len(prompts), multiple)
  prefix_of = np.zeros(count, np.int32)
  prefix_of[: len(prompts)] = [
    prefix_number[tuple(p[:n].tolist())] for p, n in zip(prompts, lengths)
  ]
  arrays = lambda prompts, rows: pad_left([np.array(p, np.int32) for p in prompts], rows, pad)
  return Prompts(
    prefixes=arrays(prefixes, rounded(len(prefixes), multiple)) if any(lengths) else None,
    rests=arrays([p[n:] for p, n in zip(prompts, lengths)], count),
    prefix_of=prefix_of,
    row=np.array([number[tuple(p[:-1].tolist())] for p in rows], np.int32),
    last=np.array([p[-1] for p in rows], np.int32),
  )


def stream_widths(prompts: Prompts, streams: int) -> tuple[int, ...]:
  """Of each stream, how many of the last slots of the prompts hold all of its own: a short prompt needs no long cache."""
  prefixed = (
    np.zeros(len(prompts.prefix_of), bool)
    if prompts.prefixes is None
    else prompts.prefixes[1].any(1)[prompts.prefix_of]
  )
  rests = prompts.rests[1].sum(axis=1)
  needed = np.where(prefixed, prompts.slots, -(-np.maximum(rests, 1) // BUCKET) * BUCKET)[
    prompts.row
  ]
  return tuple(int(n) for n in needed.reshape(-1, streams).max(axis=0))
