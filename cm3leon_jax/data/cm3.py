"""The CM3 objective: spans move to the end of the sample and are predicted there, with context from both sides."""

# T length of a sample in tokens.

import itertools

import numpy as np

from cm3leon_jax.vocab import VocabLayout

OVERHEAD = 3  # A span adds <mask:i> in its place, and <mask:i> ... <eoss> around it at the end.


def segment_bounds(segment_lengths) -> list[tuple[int, int]]:
  """Where the segments of a joined sample lie, as half-open ranges.

  >>> segment_bounds([3, 4])  # </s> t t t <break> i i i i </s>
  [(1, 4), (5, 9)]
  """
  ends = itertools.accumulate(segment_lengths, lambda end, n: end + 1 + int(n), initial=0)
  return [(before + 1, end) for before, end in itertools.pairwise(ends)]


def draw_spans(
  segment_lengths, num_spans: int, whole_segments: bool, rng: np.random.Generator
) -> tuple[tuple[int, int], ...]:
  """Draws at most `num_spans` disjoint spans that leave context and never cross `<break>` or `</s>`.

  Free spans are drawn as in CM3Leon's released code: two uniform points of the whole sample, clipped
  to the segment that they cover most. Candidates that are empty, meet a span already drawn or would
  mask the last content token that remains are passed over. Whole segments leave at least one
  segment; a sample of one segment gets free spans instead.

  Args:
    segment_lengths: lengths of all segments of the joined sample, neighbors included.
    num_spans: how many are wanted; at most num_spans ** 2 candidates are tried.
    whole_segments: the spans are whole segments: a whole caption, a whole image.
    rng: the sample's own generator.

  Returns:
    Half-open ranges of the joined sample in ascending order; possibly fewer than `num_spans`, possibly none.
  """
  bounds = segment_bounds(segment_lengths)
  if whole_segments and len(bounds) > 1:
    chosen = rng.permutation(len(bounds))[: min(num_spans, len(bounds) - 1)].tolist()
    return tuple(sorted(bounds[i] for i in chosen))
  total = bounds[-1][1] + 1
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


def cm3_layout(length: int, spans) -> np.ndarray:
  """Where each token of the transformed sample comes from.

  Args:
    length: T, of the joined sample.
    spans: n ascending, disjoint half-open ranges.

  Returns:
    [T + 3n] int64: an index into the sample, or `length + i` for `<mask:i>`, or `length + n` for `<eoss>`.
  """
  kept, moved, position = [], [], 0
  for i, (start, end) in enumerate(spans):
    sentinel = [length + i]
    kept += [np.arange(position, start), sentinel]
    moved += [sentinel, np.arange(start, end), [length + len(spans)]]
    position = end
  return np.concatenate([*kept, np.arange(position, length), *moved]).astype(np.int64)


def apply_cm3_mask(tokens: np.ndarray, spans, vocab: VocabLayout) -> np.ndarray:
  """Moves spans to the end (CM3, Aghajanyan et al. 2022, section 2).

    tokens = [</s> 7 8 9 <break> 91 92 93 94 </s>], spans = [(1, 4)]: the caption 7 8 9
    result = [</s> <mask:0> <break> 91 92 93 94 </s> <mask:0> 7 8 9 <eoss>]

  Args:
    tokens: [T] int32.
    spans: n ascending, disjoint half-open ranges.
    vocab: names the sentinels.

  Returns:
    [T + 3n] int32.
  """
  specials = [vocab.mask(i) for i in range(len(spans))] + [vocab.eoss]
  return np.concatenate([tokens, specials]).astype(np.int32)[cm3_layout(len(tokens), spans)]


def undo_cm3_mask(tokens: np.ndarray, vocab: VocabLayout) -> np.ndarray:
  """The inverse of `apply_cm3_mask`, for samples without `<mask:*>` and `<eoss>` of their own.

  Args:
    tokens: [T] int32, transformed.
    vocab: names the sentinels.

  Returns:
    The sample before its spans were moved, int32.

  Raises:
    ValueError: a sentinel has no infill, or an infill no `<eoss>`.
  """
  tokens = np.asarray(tokens, np.int32)
  first = np.flatnonzero(tokens == vocab.mask(0))
  if not len(first):
    return tokens
  if len(first) < 2:
    raise ValueError("<mask:0> stands once: its infill is missing.")
  body, tail = tokens[: first[1]], tokens[first[1] :]
  ends = np.flatnonzero(tail == vocab.eoss)
  infills = (
    {int(part[0]): part[1:] for part in np.split(tail, ends[:-1] + 1) for part in [part[:-1]]}
    if len(ends)
    else {}
  )
  pieces, position = [], 0
  for place in np.flatnonzero(vocab.is_mask(body)):
    sentinel = int(body[place])
    if sentinel not in infills:
      raise ValueError(f"<mask:{sentinel - vocab.mask(0)}> has no infill that ends in <eoss>.")
    pieces += [body[position:place], infills[sentinel]]
    position = place + 1
  return np.concatenate([*pieces, body[position:]]).astype(np.int32)
