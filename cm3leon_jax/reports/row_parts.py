"""Splits a training row into samples, and samples into parts, using only the arrays of the row."""

# L positions of a row, T tokens of a sample.

import dataclasses

import numpy as np

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.data.rows.loader import join
from cm3leon_jax.positions import positions_of
from cm3leon_jax.vocab import VocabLayout

NO_SPAN = -1


@dataclasses.dataclass(frozen=True)
class RowSample:
  """Sample of a row.

  Attributes:
    segment_id: number of the sample in the row, from 1.
    start: first position in the row. Position `start + t` reads token t and predicts token t + 1.
    tokens: [T] int32. They take T - 1 positions of the row.
    weights: [T] float32 loss weights of the tokens as targets. The first token is never a target,
      so its weight is 0.
    positions: [T - 1] int32 positions in the sample, as in the row's array `positions`.
  """

  segment_id: int
  start: int
  tokens: np.ndarray
  weights: np.ndarray
  positions: np.ndarray

  @property
  def num_positions(self) -> int:
    """Number of positions that the sample takes in the row."""
    return len(self.tokens) - 1


@dataclasses.dataclass(frozen=True)
class RowPart:
  """Special token of a sample, or consecutive text tokens or image codes.

  Attributes:
    kind: "special", "text" or "image".
    start, stop: half-open range of tokens in the sample.
    segment: index of the segment among all segments of the neighbors and the document. A moved part
      has the index of its original segment.
    span: i for `<mask:i>` and for the tokens that it replaces; otherwise NO_SPAN.
    moved: whether the part is at the end of the sample, in `<mask:i> span <eoss>`.
  """

  kind: str
  start: int
  stop: int
  segment: int
  span: int = NO_SPAN
  moved: bool = False


def split_row(
  row: dict[str, np.ndarray], vocab: VocabLayout, align_images: bool = False
) -> list[RowSample]:
  """Cuts a row into its samples by its segment ids.

  `row` has the arrays of `pipeline.FIELDS`, each [L]. For `align_images`, see `positions_of`.

    inputs       </s> 7  8    </s> 9    <pad>
    targets      7    8  </s> 9    </s> <pad>
    segment_ids  1    1  1    2    2    0
    positions    0    1  2    0    1    0
    result = samples with the tokens [</s> 7 8 </s>] and [</s> 9 </s>]

  Raises:
    ValueError: segment ids are not 1, 2, ..., then 0; positions of a sample differ from
      `positions_of`; a target is not the next input; a weight is negative or not finite; or padding
      has a token other than `<pad>` or a loss weight.
  """
  ids = row["segment_ids"]
  starts = np.flatnonzero(np.diff(ids, prepend=-1))
  numbers = ids[starts].tolist()
  count = sum(n != 0 for n in numbers)
  if numbers != [*range(1, count + 1), *[0] * (len(numbers) - count)] or numbers.count(0) > 1:
    raise ValueError(
      f"segment ids run {numbers}; they must count 1, 2, ... and then be 0 for padding."
    )
  samples = []
  for number, start, stop in zip(numbers, starts.tolist(), [*starts[1:].tolist(), len(ids)]):
    cut = {name: values[start:stop] for name, values in row.items()}
    tokens = np.concatenate([cut["inputs"][:1], cut["targets"]])
    positions = positions_of(tokens, vocab, align_images)[:-1]
    fault = _sample_fault(cut, positions, vocab) if number else _padding_fault(cut, vocab.pad)
    if fault:
      raise ValueError(f"positions {start} to {stop - 1} (segment id {number}): {fault}")
    if number:
      weights = np.concatenate([np.zeros(1, np.float32), cut["loss_weights"]])
      samples.append(RowSample(number, start, tokens, weights, positions))
  return samples


def _sample_fault(cut: dict[str, np.ndarray], positions: np.ndarray, vocab: VocabLayout) -> str:
  inputs, before = cut["inputs"][1:], cut["targets"][:-1]
  hidden = (inputs == vocab.unk) & vocab.is_image(before)  # Inputs that `data.code_dropout` hides.
  if not ((inputs == before) | hidden).all():
    return "a target is not the next input."
  if not np.array_equal(cut["positions"], positions):
    return f"positions in the sample do not count from {positions[0]}."
  if not (np.isfinite(cut["loss_weights"]) & (cut["loss_weights"] >= 0)).all():
    return "a loss weight is negative or not finite."
  return ""


def _padding_fault(cut: dict[str, np.ndarray], pad: int) -> str:
  if (cut["inputs"] != pad).any() or (cut["targets"] != pad).any():
    return "padding has a token other than <pad>."
  return "padding has a loss weight." if cut["loss_weights"].any() else ""


def split_parts(tokens: np.ndarray, vocab: VocabLayout) -> list[RowPart]:
  """Splits a sample into parts, in the order of its tokens.

  tokens = [</s> 7 8 <break> 91 <mask:0> 94 </s> <mask:0> 92 93 <eoss>]
  segment 0: </s>, text 1 to 3, <break>
  segment 1: image 4 to 5, <mask:0> of span 0, image 6 to 7, </s>
  segment 1, span 0, moved: <mask:0>, image 9 to 11, <eoss>
  """
  kinds = np.select(
    [tokens < vocab.num_special, vocab.is_image(tokens)], ["special", "image"], "text"
  )
  cuts = np.flatnonzero((kinds[1:] != kinds[:-1]) | (kinds[1:] == "special")) + 1
  left: dict[int, int] = {}  # Span -> its original segment.
  parts, segment, span, moved = [], 0, NO_SPAN, False
  for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(tokens)]):
    token, place = int(tokens[start]), segment
    if vocab.is_mask(token):
      span = token - vocab.mask(0)
      moved = span in left
      place = left.setdefault(span, segment)
    elif moved:
      place = left.get(span, segment)
    parts.append(RowPart(str(kinds[start]), start, stop, place, span, moved))
    segment += token == vocab.brk
    if not moved or token == vocab.eoss:
      span = NO_SPAN
  return parts


def restore(parts: list[RowPart]) -> list[list[RowPart]]:
  """Returns the text and image parts of each segment, with moved parts in their original places.

  A segment that was dropped has no parts.
  """
  segments: list[list[RowPart]] = [[] for _ in range(1 + max(part.segment for part in parts))]
  moved: dict[int, list[RowPart]] = {}
  for part in (p for p in parts if p.moved and p.kind != "special"):
    moved.setdefault(part.span, []).append(part)
  for part in (p for p in parts if not p.moved):
    if part.kind != "special":
      segments[part.segment].append(part)
    elif part.span != NO_SPAN:
      segments[part.segment] += moved.get(part.span, [])
  return segments


def is_dropped(tokens: np.ndarray, vocab: VocabLayout) -> bool:
  """Returns whether `<mask:0>` replaces caption and neighbors, so that no infill follows."""
  return int(np.count_nonzero(tokens == vocab.mask(0))) == 1


def check_sample(
  tokens: np.ndarray, documents: list[Document], vocab: VocabLayout, length: int
) -> int:
  """Checks that a sample has exactly the tokens of its documents.

  `documents` are the neighbors in order, then the document itself. A sample that fills the row of
  `length` (L) positions, T = L + 1, may lack its last tokens. Returns the number of missing tokens.

  Raises:
    ValueError: a token or the length is wrong. The message names the first wrong token, or both
      lengths.
  """
  if is_dropped(tokens, vocab):
    opening, image = [vocab.eos, vocab.mask(0), vocab.brk], documents[-1].segments[-1].tokens
    expected, found = np.concatenate([opening, image, [vocab.eos]]), tokens
  else:
    expected, found = join(documents, vocab), cm3.undo_cm3_mask(tokens, vocab)
  shared, key = min(len(expected), len(found)), documents[-1].key
  wrong = np.flatnonzero(expected[:shared] != found[:shared])
  if len(wrong):
    at = int(wrong[0])
    raise ValueError(
      f"the sample of document '{key}', with restored spans, has token {found[at]} at {at}; "
      f"its documents have {expected[at]}."
    )
  if len(found) > len(expected) or (len(found) < len(expected) and len(tokens) <= length):
    raise ValueError(
      f"the sample of document '{key}', with restored spans, has {len(found)} tokens; "
      f"its documents have {len(expected)}."
    )
  return len(expected) - len(found)
