"""What can be asked of the model: for each task the prompts of its guidance streams, and the plan of what follows."""

# T tokens of a prompt, I tokens of an image, S guidance streams.

from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.cm3 import undo_cm3_mask
from cm3leon_jax.decoding import grammar, guidance
from cm3leon_jax.decoding.grammar import Part
from cm3leon_jax.decoding.sampling import SamplingConfig
from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class Request:
  """One thing to generate.

  Attributes:
    streams: S prompts, [T] int32 each: the whole one first; with guidance the unconditional one last.
    plan: what follows.
  """

  streams: tuple[np.ndarray, ...]
  plan: tuple[Part, ...]

  @property
  def positions(self) -> int:
    """Most positions that it takes, prompt included."""
    return max(len(s) for s in self.streams) + grammar.longest(self.plan)

  def guidance(self, sampling: SamplingConfig, image_tokens: int) -> np.ndarray:
    """[I + 1, S] fp32 weights of the streams for each code of an image; what is no code is weighed like the last code."""
    match len(self.streams):
      case 1:
        weights = np.ones((image_tokens, 1), np.float32)
      case 2:
        weights = guidance.text_to_image_weights(
          sampling.guidance, sampling.guidance_schedule, image_tokens
        )
      case _:
        weights = guidance.editing_weights(
          sampling.image_guidance, sampling.edit_guidance, sampling.guidance_schedule, image_tokens
        )
    return np.concatenate([weights, weights[-1:]])


@dataclasses.dataclass(frozen=True)
class Hole:
  """A part of a segment that is to be filled in: `codes` image codes, or text of at most `most_text` tokens."""

  codes: int = 0
  most_text: int = 0


def _joined(vocab: VocabLayout, segments) -> np.ndarray:
  """`</s>`, then every segment with `<break>` behind it."""
  return np.concatenate(
    [[vocab.eos], *(part for s in segments for part in (s, [vocab.brk]))]
  ).astype(np.int32)


def _flat(documents: Sequence[Sequence]) -> list:
  return [segment for document in documents for segment in document]


def check_image(codes, image_tokens: int) -> None:
  """Raises UserError if an image, [I] ids, has not the length of one."""
  if len(codes) != image_tokens:
    raise UserError(
      f"an image of the prompt has {len(codes)} codes; images of this model have {image_tokens}."
    )


def unconditional_prompt(vocab: VocabLayout) -> np.ndarray:
  """`</s> <mask:0> <break>`: what the conditioning drop of training made the model see."""
  return np.array([vocab.eos, vocab.mask(0), vocab.brk], np.int32)


def text_to_image(
  vocab: VocabLayout,
  image_tokens: int,
  caption,
  neighbors: Sequence[Sequence] = (),
  keep: bool = False,
):
  """Retrieved documents, each a sequence of segments' ids, then the caption (CM3Leon, section 2.1).

    caption = [7 8], neighbors = [([5 6], [91 92])]:
    </s> 5 6 <break> 91 92 <break> 7 8 <break>, guided against </s> <mask:0> <break>

  Args:
    vocab: names the specials.
    image_tokens: I.
    caption: its ids.
    neighbors: best first.
    keep: the unconditional stream keeps the neighbors: </s> 5 6 <break> 91 92 <break> <mask:0> <break>.

  Returns:
    Request. Raises UserError if the caption is empty.
  """
  if not len(caption):
    raise UserError("a prompt is empty: give at least one word to draw.")
  before = _flat(neighbors)
  nothing = _joined(vocab, [*before, [vocab.mask(0)]]) if keep else unconditional_prompt(vocab)
  return Request(
    (_joined(vocab, [*before, caption]), nothing),
    (Part(grammar.CODES, image_tokens), Part(grammar.END)),
  )


def unconditional(vocab: VocabLayout, image_tokens: int) -> Request:
  """An image of anything."""
  return Request(
    (unconditional_prompt(vocab),), (Part(grammar.CODES, image_tokens), Part(grammar.END))
  )


def edit(vocab: VocabLayout, image_tokens: int, before, image, instruction) -> Request:
  """An image made from another by an instruction (sections 4.1 and E, InstructPix2Pix's template).

    before = [5], image = [91 92], instruction = [7]:
    </s> 5 <break> 91 92 <break> 7 <break>, </s> 5 <break> 91 92 <break> and </s> <mask:0> <break>

  Raises:
    UserError: no instruction, or an image of another length.
  """
  if not len(instruction):
    raise UserError("the instruction is empty: say what is to be changed.")
  check_image(image, image_tokens)
  full, without = _joined(vocab, [before, image, instruction]), _joined(vocab, [before, image])
  plan = (Part(grammar.CODES, image_tokens), Part(grammar.END))
  return Request((full, without, unconditional_prompt(vocab)), plan)


def infill(
  vocab: VocabLayout,
  image_tokens: int,
  segments: Sequence[Sequence],
  neighbors: Sequence[Sequence] = (),
) -> Request:
  """A document with holes, which are filled at its end as CM3 trained it.

    segments = [([7 8],), ([91], Hole(codes=2), [94])]:
    </s> 7 8 <break> 91 <mask:0> 94 </s> <mask:0> ..., then 2 codes and <eoss>
    segments = [(Hole(most_text=9),), ([91 92 93 94],)]: a caption

  A hole of an image is guided by the texts: in the unconditional stream each is one sentinel, behind those of the holes:
  </s> <mask:1> <break> 91 <mask:0> 94 </s> <mask:0>.

  Args:
    vocab: names the specials.
    image_tokens: I, of every segment that holds image codes.
    segments: of the document; each is a sequence of ids and holes.
    neighbors: retrieved documents, best first.

  Returns:
    Request. Raises UserError for a document without a hole, a hole without room, of the other kind than its segment or beside
    another hole, an image of another length, or more holes than there are sentinels.
  """
  holes = [piece for segment in segments for piece in segment if isinstance(piece, Hole)]
  if not holes:
    raise UserError("there is nothing to fill in: put a mask into the prompt.")
  if len(holes) >= vocab.num_masks:
    raise UserError(
      f"the prompt has {len(holes)} masks; the vocabulary has sentinels for {vocab.num_masks - 1}."
    )
  for segment in segments:
    _check_segment(vocab, image_tokens, segment)
  marked, count = [], 0
  for segment in segments:
    pieces = []
    for piece in segment:
      pieces.append([vocab.mask(count)] if isinstance(piece, Hole) else piece)
      count += isinstance(piece, Hole)
    marked.append(np.concatenate(pieces).astype(np.int32))
  before = _flat(neighbors)
  prompt = lambda parts: np.append(_joined(vocab, parts)[:-1], [vocab.eos, vocab.mask(0)]).astype(
    np.int32
  )
  streams, texts = (
    (prompt([*before, *marked]),),
    [not _is_image(vocab, segment) for segment in segments],
  )
  if all(hole.codes for hole in holes) and any(texts):
    hidden = [
      np.array([vocab.mask(len(holes))]) if text else segment
      for text, segment in zip(texts, marked)
    ]
    streams += (prompt(hidden),)
  plan = [part for i, hole in enumerate(holes) for part in (Part(grammar.MASK, i), *_filling(hole))]
  return Request(streams, tuple(plan[1:]))


def _filling(hole: Hole) -> tuple[Part, ...]:
  if hole.codes:
    return Part(grammar.CODES, hole.codes), Part(grammar.EOSS)
  return (Part(grammar.TEXT, hole.most_text),)


def _is_image(vocab, segment) -> bool:
  return any(
    piece.codes > 0 if isinstance(piece, Hole) else vocab.is_image(np.asarray(piece)).any()
    for piece in segment
  )


def _check_segment(vocab, image_tokens, segment) -> None:
  image = _is_image(vocab, segment)
  for piece in segment:
    if isinstance(piece, Hole):
      if (image and not piece.codes) or (not image and piece.most_text < 1):
        kind = (
          "image is filled with its codes" if image else "text is filled with at least one token"
        )
        raise UserError(
          f"a mask of {piece.codes} codes and {piece.most_text} tokens of text: a mask in an {kind}."
        )
    elif image != bool(vocab.is_image(np.asarray(piece)).all()) and len(piece):
      raise UserError(
        "a segment of the prompt mixes text and image codes: they are segments of their own."
      )
  if any(isinstance(a, Hole) and isinstance(b, Hole) for a, b in itertools.pairwise(segment)):
    raise UserError(
      "two masks stand side by side: where one ends cannot be told; put them into one."
    )
  if image:
    lengths = [piece.codes if isinstance(piece, Hole) else len(piece) for piece in segment]
    check_image(range(sum(lengths)), image_tokens)


def document(
  vocab: VocabLayout, image_tokens: int, segments: Sequence, length: int, after_break: bool = False
) -> Request:
  """Texts and images in turn, as the model likes, behind the segments of a prompt.

  Args:
    vocab: names the specials.
    image_tokens: I.
    segments: ids of each segment of the prompt; none: from the start.
    length: most tokens that are generated, `</s>` included.
    after_break: the last segment of the prompt is complete, and another begins; else a text is continued.

  Returns:
    Request. Raises UserError if `length` leaves no room for a token and `</s>`, or for an image of another length.
  """
  if length < 2:
    raise UserError(f"the length is {length}; one token and </s> are the least.")
  image = bool(len(segments)) and _is_image(vocab, [segments[-1]])
  for segment in segments:
    if vocab.is_image(np.asarray(segment)).any():
      check_image(segment, image_tokens)
  prompt = _joined(vocab, segments)
  place = grammar.SEGMENT_START
  if len(segments) and not after_break:
    prompt, place = prompt[:-1], grammar.AFTER_IMAGE if image else grammar.IN_TEXT
  return Request((prompt,), (Part(grammar.DOCUMENT, length, place),))


def segments_of(vocab: VocabLayout, request: Request, ids) -> list[np.ndarray]:
  """The segments of a request's document, retrieved ones included, with what was generated, [G] ids, in its place."""
  whole = np.concatenate([request.streams[0], ids]).astype(np.int32)
  whole = undo_cm3_mask(whole, vocab) if vocab.eoss in whole else whole
  parts = np.split(whole, np.flatnonzero((whole == vocab.brk) | (whole == vocab.eos)))
  return [segment for part in parts if len(segment := part[1:])]
