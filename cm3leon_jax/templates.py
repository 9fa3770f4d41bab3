"""Joins texts and images into documents and prompts, by the template that the vocabulary names.

Rows, prompts, the grammar of decoding and everything that reads documents take from here which
tokens stand between the parts of a sequence.
"""

# T tokens of a sequence.

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import NamedTuple, TypeAlias

from jaxtyping import Int32
import numpy as np

from cm3leon_jax.vocab import VocabLayout

# Kinds of parts. The kind of a segment is its `is_image`. START and END are the ends of a sequence.
# A prompt ends in DRAWN if an image, and in WRITTEN if a text will be generated.
TEXT, IMAGE, START, END, DRAWN, WRITTEN = range(6)
# Where the next token of a generated document is, if it is not in an image.
SEGMENT_START, IN_TEXT, AFTER_IMAGE = -1, -2, 0

Ids: TypeAlias = Sequence[int] | np.ndarray
# Lengths of the segments of a document, and whether each is an image.
Lengths: TypeAlias = tuple[Sequence[int], Sequence[bool]]


class Rule(NamedTuple):
  """Says when a token may come in a generated document.

  Attributes:
    places: where it may come.
    tokens: number of tokens that must still be allowed, this one included.
    images: number of images whose codes must still be allowed in addition.
  """

  places: tuple[int, ...]
  tokens: int = 1
  images: int = 0


@dataclasses.dataclass(frozen=True)
class Template:
  """The tokens between the parts of documents and prompts, for one vocabulary.

  Attributes:
    between: (kind of a part, kind of the next part) -> ids between them.
    absent: segments in place of the texts and images of a condition that is dropped.
    rules: name of a token, as in `VocabLayout`, or "text" or "image" -> when a generated document
      may have it.
    opens_image: whether `<break>` begins an image. If not, it begins a segment of any kind.
    end: name of the token that ends a generated document.
    after_drawn: names of the tokens that may follow a generated image.
    captions_follow: whether captions and answers follow their image. If not, they are infilled.
    drops_texts: whether the stream without the instruction of an edit has no text at all.
  """

  between: Mapping[tuple[int, int], tuple[int, ...]]
  absent: tuple[tuple[int, ...], ...]
  rules: Mapping[str, Rule]
  opens_image: bool = False
  end: str = "eos"
  after_drawn: tuple[str, ...] = ("eos", "brk")
  captions_follow: bool = False
  drops_texts: bool = False

  @functools.cached_property
  def separators(self) -> list[int]:
    """All ids that stand between parts."""
    return sorted({*itertools.chain(*self.between.values())})

  @functools.cached_property
  def _gaps(self) -> dict[tuple[int, int], int]:
    return {kinds: len(ids) for kinds, ids in self.between.items()}

  def join(
    self, segments: Sequence[Ids], kinds: Iterable[int], end: int | None = END
  ) -> Int32[np.ndarray, " T"]:
    """Joins segments of the given kinds. `end` is END, DRAWN or WRITTEN; None adds no tokens.

    cm3leon, [7 8] and [91 92]:    </s> 7 8 <break> 91 92 </s>
    chameleon, [7 8] and [91 92]:  </s> 7 8 <break> 91 92 <image_end>
    chameleon, [7 8], end=DRAWN:   </s> 7 8 <eoss> <break>
    """
    parts: list[Ids] = []
    before = START
    for segment, kind in zip(segments, kinds, strict=True):
      parts += [self.between[before, kind], segment]
      before = kind
    if end is not None or not parts:
      parts.append(self.between[before, WRITTEN if end is None else end])
    return np.concatenate(parts).astype(np.int32)

  def bounds(self, documents: Iterable[Lengths]) -> list[tuple[int, int]]:
    """Computes the half-open ranges of the segments of joined documents.

    cm3leon, lengths 3 and 4: [(1, 4), (5, 9)] for </s> t t t <break> i i i i </s>
    """
    result, stop, before, gaps = [], 0, START, self._gaps
    for lengths, kinds in documents:
      for length, kind in zip(lengths, kinds):
        start = stop + gaps[before, kind]
        stop = start + int(length)
        result.append((start, stop))
        before = kind
    return result

  def length(self, documents: Iterable[Lengths]) -> int:
    """Counts the tokens of joined documents."""
    result, before, gaps = 0, START, self._gaps
    for lengths, kinds in documents:
      result += sum(lengths)
      for kind in kinds:
        result += gaps[before, kind]
        before = kind
    return int(result) + gaps[before, END]

  def start_of(self, neighbors: Sequence[Lengths], document: Lengths) -> int:
    """Returns the index of the first token of a document after its neighbors."""
    return self.bounds([*neighbors, document])[sum(len(kinds) for _, kinds in neighbors)][0]

  def dropped_length(self, image: int) -> int:
    """Counts the tokens of a sample of an image, with so many codes, without its condition."""
    return self.length([([*map(len, self.absent), image], [*[False] * len(self.absent), True])])


def _cm3leon(before: int, after: int) -> tuple[str, ...]:
  return ("eos",) if before == START or after == END else ("brk",)


def _chameleon(before: int, after: int) -> tuple[str, ...]:
  begin = ("brk",) if after in (IMAGE, DRAWN) else ()
  if (before, after) == (TEXT, IMAGE):
    return begin
  return ({START: "eos", TEXT: "eoss", IMAGE: "image_end"}[before], *begin)


def _between(
  vocab: VocabLayout, names: Callable[[int, int], tuple[str, ...]]
) -> dict[tuple[int, int], tuple[int, ...]]:
  pairs = itertools.product((TEXT, IMAGE, START), (TEXT, IMAGE, END, DRAWN, WRITTEN))
  return {pair: tuple(getattr(vocab, name) for name in names(*pair)) for pair in pairs}


@functools.cache
def of(vocab: VocabLayout) -> Template:
  """Returns the template that a vocabulary names."""
  if vocab.template == "cm3leon":
    return Template(
      _between(vocab, _cm3leon),
      absent=((vocab.mask(0),),),
      rules={
        "text": Rule((SEGMENT_START, IN_TEXT), 2),
        "image": Rule((SEGMENT_START,), 1, 1),
        "eos": Rule((IN_TEXT, AFTER_IMAGE)),
        "brk": Rule((IN_TEXT, AFTER_IMAGE), 3),
      },
    )
  # A `<break>` must leave space for the codes, `<image_end>` and `<eoss>`.
  return Template(
    _between(vocab, _chameleon),
    absent=(),
    rules={
      "text": Rule((SEGMENT_START, IN_TEXT), 2),
      "eoss": Rule((IN_TEXT,)),
      "brk": Rule((SEGMENT_START, IN_TEXT), 3, 1),
      "image_end": Rule((AFTER_IMAGE,)),
    },
    opens_image=True,
    end="eoss",
    after_drawn=("image_end",),
    captions_follow=True,
    drops_texts=True,
  )
