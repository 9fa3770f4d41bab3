"""Implements CM3: spans move to the end and are predicted from the tokens on both sides."""

# T tokens of a sample, n spans.

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.vocab import VocabLayout

OVERHEAD = 3  # A span adds three tokens: <mask:i> in its place, <mask:i> and <eoss> at the end.


def sample_spans(
  bounds: Sequence[tuple[int, int]],
  total: int,
  num_spans: int,
  whole_segments: bool,
  rng: np.random.Generator,
) -> tuple[tuple[int, int], ...]:
  """Samples disjoint spans, which never mask the whole sample or cross a token between segments.

  A free span lies between two uniformly random points of the sample. It is clipped to the segment
  with which it overlaps most (CM3Leon's released code). A span is rejected if it is empty, overlaps
  an earlier span or would leave no token of the segments unmasked. If spans are whole segments, at
  least one segment is not masked. A sample with one segment always gets free spans.

  Args:
    bounds: half-open ranges of all segments of the joined sample, neighbors included.
    total: length of the joined sample.
    num_spans: number of spans. The function tries at most num_spans ** 2 free spans.
    whole_segments: whether spans are whole segments, e.g. a caption or an image.

  Returns:
    At most `num_spans` half-open ranges of the joined sample, in ascending order.
  """
  if whole_segments and len(bounds) > 1:
    chosen = rng.permutation(len(bounds))[: min(num_spans, len(bounds) - 1)].tolist()
    return tuple(sorted(bounds[i] for i in chosen))
  context = sum(end - start for start, end in bounds)
  spans: list[tuple[int, int]] = []
  for _ in range(num_spans**2):
    low, high = sorted((int(rng.random() * (total + 1)), int(rng.random() * (total + 1))))
    start, end = 0, 0
    for a, b in bounds:
      if min(high, b) - max(low, a) > end - start:
        start, end = max(low, a), min(high, b)
    apart = all(end <= a or b <= start for a, b in spans)
    if apart and 0 < end - start < context:
      spans.append((start, end))
      context -= end - start
    if len(spans) == num_spans:
      break
  return tuple(sorted(spans))


def cm3_layout(length: int, spans: Sequence[tuple[int, int]]) -> np.ndarray:
  """Computes, for each token of the transformed sample, its index in the joined sample.

    length = 6, spans = [(1, 4)]
    result = [0 6 4 5 6 1 2 3 7]: 6 is <mask:0>, 7 is <eoss>

  Args:
    length: T, the number of tokens of the joined sample.
    spans: n ascending, disjoint half-open ranges.

  Returns:
    [T + 3n] int64: indices in the sample, `length + i` for `<mask:i>`, `length + n` for `<eoss>`.
  """
  kept, moved, position = [], [], 0
  for i, (start, end) in enumerate(spans):
    sentinel = [length + i]
    kept += [np.arange(position, start), sentinel]
    moved += [sentinel, np.arange(start, end), [length + len(spans)]]
    position = end
  return np.concatenate([*kept, np.arange(position, length), *moved]).astype(np.int64)


def apply_cm3_mask(
  tokens: np.ndarray, spans: Sequence[tuple[int, int]], vocab: VocabLayout
) -> np.ndarray:
  """Moves spans to the end (CM3, Aghajanyan et al. 2022, section 2).

    tokens = [</s> 7 8 9 <break> 91 92 93 94 </s>], spans = [(1, 4)]: the caption 7 8 9
    result = [</s> <mask:0> <break> 91 92 93 94 </s> <mask:0> 7 8 9 <eoss>]

  `tokens` is [T] int32. `spans` are n ascending, disjoint half-open ranges. The result is [T + 3n]
  int32.
  """
  specials = [vocab.mask(i) for i in range(len(spans))] + [vocab.eoss]
  return np.concatenate([tokens, specials]).astype(np.int32)[cm3_layout(len(tokens), spans)]


def undo_cm3_mask(tokens: np.ndarray, vocab: VocabLayout) -> np.ndarray:
  """Reverses `apply_cm3_mask`. The original sample must not contain `<mask:*>` or `<eoss>`.

    tokens = [</s> <mask:0> <break> 91 92 93 94 </s> <mask:0> 7 8 9 <eoss>]
    result = [</s> 7 8 9 <break> 91 92 93 94 </s>]

  `tokens` is [T + 3n] int32, and the result is [T] int32.

  Raises:
    ValueError: a sentinel has no infill at the end, or an infill has no `<eoss>`.
  """
  tokens = np.asarray(tokens, np.int32)
  first = np.flatnonzero(tokens == vocab.mask(0))
  if not len(first):
    return tokens
  if len(first) < 2:
    raise ValueError("<mask:0> occurs only once: its infill is missing.")
  body, tail = tokens[: first[1]], tokens[first[1] :]
  ends = np.flatnonzero(tail == vocab.eoss)
  tails = np.split(tail, ends[:-1] + 1) if len(ends) else []
  infills = {int(piece[0]): piece[1:-1] for piece in tails}
  pieces: list[np.ndarray] = []
  position = 0
  for place in np.flatnonzero(vocab.is_mask(body)).tolist():
    sentinel = int(body[place])
    if sentinel not in infills:
      raise ValueError(f"<mask:{sentinel - vocab.mask(0)}> has no infill that ends in <eoss>.")
    pieces += [body[position:place], infills[sentinel]]
    position = place + 1
  return np.concatenate([*pieces, body[position:]]).astype(np.int32)
