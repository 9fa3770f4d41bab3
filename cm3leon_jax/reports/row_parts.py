"""What a row of training holds, read off its arrays alone: its samples, and the parts that these consist of."""

# L slots of a row, T tokens of a sample.

import dataclasses

import numpy as np

from cm3leon_jax.data import cm3
from cm3leon_jax.data.documents import Document
from cm3leon_jax.data.pipeline import join
from cm3leon_jax.vocab import VocabLayout

NO_SPAN = -1


@dataclasses.dataclass(frozen=True)
class Sample:
  """One sample of a row.

  Attributes:
    segment_id: its number in the row, from 1.
    start: its first slot; slot `start + t` reads token t and predicts token t + 1.
    tokens: [T] int32; they take T - 1 slots.
    weights: [T] float32, what each token weighs as a target. The first is never one; its weight is 0.
  """

  segment_id: int
  start: int
  tokens: np.ndarray
  weights: np.ndarray

  @property
  def slots(self) -> int:
    return len(self.tokens) - 1


@dataclasses.dataclass(frozen=True)
class Part:
  """Tokens of a sample that stand together: one special token, or a run of text or of image codes.

  Attributes:
    kind: "special", "text" or "image".
    start, stop: half-open range of the sample's tokens.
    segment: number of the segment that it belongs to, neighbors' included; that of a moved part is the one it left.
    span: i, if it is `<mask:i>` or stands at the end for it; else NO_SPAN.
    moved: it stands at the end, behind the sample: `<mask:i> span <eoss>`.
  """

  kind: str
  start: int
  stop: int
  segment: int
  span: int = NO_SPAN
  moved: bool = False


def split_row(row: dict[str, np.ndarray], vocab: VocabLayout) -> list[Sample]:
  """Cuts a row into its samples by its segment ids.

    inputs       </s> 7  8    </s> 9    <pad>
    targets      7    8  </s> 9    </s> <pad>
    segment_ids  1    1  1    2    2    0
    positions    0    1  2    0    1    0
    result = samples of the tokens [</s> 7 8 </s>] and [</s> 9 </s>]

  Args:
    row: arrays of [L], those of `pipeline.FIELDS`.
    vocab: names the padding.

  Raises:
    ValueError: segment ids do not count 1, 2, ..., then 0; positions do not count from 0 in a sample; a target is not the next
      input; a weight is negative or not finite; or padding is not all pad and weighs something.
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
    wrong = _fault_of_sample(cut) if number else _fault_of_padding(cut, vocab.pad)
    if wrong:
      raise ValueError(f"slots {start} to {stop - 1} (segment id {number}): {wrong}")
    if number:
      tokens = np.concatenate([cut["inputs"][:1], cut["targets"]])
      samples.append(
        Sample(
          number, start, tokens, np.concatenate([np.zeros(1, np.float32), cut["loss_weights"]])
        )
      )
  return samples


def _fault_of_sample(cut: dict[str, np.ndarray]) -> str:
  if not np.array_equal(cut["positions"], np.arange(len(cut["positions"]))):
    return "positions do not count from 0."
  if not np.array_equal(cut["inputs"][1:], cut["targets"][:-1]):
    return "a target is not the next input."
  if not (np.isfinite(cut["loss_weights"]) & (cut["loss_weights"] >= 0)).all():
    return "a loss weight is negative or not finite."
  return ""


def _fault_of_padding(cut: dict[str, np.ndarray], pad: int) -> str:
  if (cut["inputs"] != pad).any() or (cut["targets"] != pad).any():
    return "padding holds another token than <pad>."
  return "padding has a loss weight." if cut["loss_weights"].any() else ""


def split_parts(tokens: np.ndarray, vocab: VocabLayout) -> list[Part]:
  """Parts of a sample in the order of its tokens.

    tokens = [</s> 7 8 <break> 91 <mask:0> 94 </s> <mask:0> 92 93 <eoss>]
    result: </s>, text 1 to 3 of segment 0, <break>; then of segment 1: image 4 to 5, <mask:0> of span 0, image 6 to 7, </s>;
      then moved, of segment 1 and span 0: <mask:0>, image 9 to 11, <eoss>

  Args:
    tokens: [T] int32.
    vocab: says what a token is.
  """
  kinds = np.select(
    [tokens < vocab.num_special, vocab.is_image(tokens)], ["special", "image"], "text"
  )
  cuts = np.flatnonzero((kinds[1:] != kinds[:-1]) | (kinds[1:] == "special")) + 1
  left: dict[int, int] = {}  # span -> segment that it left
  found, segment, span, moved = [], 0, NO_SPAN, False
  for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(tokens)]):
    token, place = int(tokens[start]), segment
    if vocab.is_mask(token):
      span = token - vocab.mask(0)
      moved = span in left
      place = left.setdefault(span, segment)
    elif moved:
      place = left.get(span, segment)
    found.append(Part(str(kinds[start]), start, stop, place, span, moved))
    segment += token == vocab.brk
    if not moved or token == vocab.eoss:
      span = NO_SPAN
  return found


def restore(parts: list[Part]) -> list[list[Part]]:
  """Each segment's runs of text or codes in their own order again: moved ones back where they left. Segments without any
  stay empty: the condition that was dropped."""
  segments: list[list[Part]] = [[] for _ in range(1 + max(part.segment for part in parts))]
  moved: dict[int, list[Part]] = {}
  for part in (p for p in parts if p.moved and p.kind != "special"):
    moved.setdefault(part.span, []).append(part)
  for part in (p for p in parts if not p.moved):
    if part.kind != "special":
      segments[part.segment].append(part)
    elif part.span != NO_SPAN:
      segments[part.segment] += moved.get(part.span, [])
  return segments


def is_dropped(tokens: np.ndarray, vocab: VocabLayout) -> bool:
  """Whether caption and neighbors gave way to a `<mask:0>` that nothing stands for at the end."""
  return int(np.count_nonzero(tokens == vocab.mask(0))) == 1


def check_sample(
  tokens: np.ndarray, documents: list[Document], vocab: VocabLayout, length: int
) -> int:
  """Makes sure that a sample holds its documents, token for token.

  Args:
    tokens: [T] int32.
    documents: neighbors in their order, then the document itself.
    vocab: of the tokens.
    length: L; a sample that fills the row, T = L + 1, may lack its end.

  Returns:
    How many tokens it lacks.

  Raises:
    ValueError: naming the first token that is another one, or the lengths.
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
      f"document '{key}', spans put back, has token {found[at]} at {at}; its documents have {expected[at]}."
    )
  if len(found) > len(expected) or (len(found) < len(expected) and len(tokens) <= length):
    raise ValueError(
      f"document '{key}' gives {len(found)} tokens, spans put back; its documents have {len(expected)}."
    )
  return len(expected) - len(found)
