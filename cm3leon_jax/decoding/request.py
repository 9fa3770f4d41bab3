"""Builds requests: the prompts of all guidance streams and the plan of the tokens that follow."""

# I tokens of an image, S guidance streams; _ is a length that varies.

from collections.abc import Sequence
import dataclasses
import itertools
from typing import TypeAlias

from jaxtyping import Float32, Int32
import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.grammar import Part
from cm3leon_jax.decoding.sampling.guidance import editing_weights, text_to_image_weights
from cm3leon_jax.errors import UserError
from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class Request:
  """Prompts of one sample, and a plan of the tokens that may follow.

  Attributes:
    streams: S prompts. The first is the complete prompt. With guidance, the last is the
      unconditional prompt.
    plan: parts that follow the prompts; the same for all streams.
  """

  streams: tuple[Int32[np.ndarray, " _"], ...]
  plan: tuple[Part, ...]

  @property
  def positions(self) -> int:
    """Largest number of positions of the request, prompt included."""
    return max(len(s) for s in self.streams) + grammar.max_new_tokens(self.plan)

  def guidance_weights(
    self, config: SamplingConfig, image_tokens: int
  ) -> Float32[np.ndarray, "{image_tokens}+1 S"]:
    """Returns the weights of the streams at each code of an image.

    The additional last row is for tokens that are not image codes. It repeats the weights of the
    last code.
    """
    schedule = config.guidance_schedule
    match len(self.streams):
      case 1:
        weights = np.ones((image_tokens, 1), np.float32)
      case 2:
        weights = text_to_image_weights(config.guidance, schedule, image_tokens)
      case _:
        weights = editing_weights(
          config.image_guidance, config.edit_guidance, schedule, image_tokens
        )
    return np.concatenate([weights, weights[-1:]])


@dataclasses.dataclass(frozen=True)
class Hole:
  """A hole in a segment: exactly `codes` image codes, or a text of at most `most_text` tokens."""

  codes: int = 0
  most_text: int = 0


Ids: TypeAlias = Sequence[int] | np.ndarray
Pieces: TypeAlias = Sequence[Ids | Hole]


def unconditional_prompt(vocab: VocabLayout) -> Int32[np.ndarray, " _"]:
  """Returns the start of training samples without a condition: `</s> <mask:0> <break>`.

  With the template chameleon, it is `</s> <break>`.
  """
  return _prompt(vocab, templates.of(vocab).absent)


def text_to_image(
  vocab: VocabLayout,
  image_tokens: int,
  caption: Ids,
  neighbors: Sequence[Sequence] = (),
  keep_neighbors: bool = False,
) -> Request:
  """Requests an image for a caption that follows retrieved documents (CM3Leon, section 2.1).

    caption = [7 8], neighbors = [([5 6], [91 92])]:
    </s> 5 6 <break> 91 92 <break> 7 8 <break>, guided against </s> <mask:0> <break>
    With `keep_neighbors`, the unconditional stream contains the neighbors, too:
    </s> 5 6 <break> 91 92 <break> <mask:0> <break>

  `neighbors` are retrieved documents, best first. Each is a sequence of segments of ids.

  Raises:
    UserError: the caption is empty.
  """
  if not len(caption):
    raise UserError("a prompt is empty: give at least one word.")
  before = list(itertools.chain(*neighbors))
  without = _prompt(vocab, [*before * keep_neighbors, *templates.of(vocab).absent])
  return Request((_prompt(vocab, [*before, caption]), without), _image_plan(image_tokens))


def unconditional(vocab: VocabLayout, image_tokens: int) -> Request:
  """Requests an image without a prompt."""
  return Request((unconditional_prompt(vocab),), _image_plan(image_tokens))


def edit(
  vocab: VocabLayout,
  image_tokens: int,
  before: Ids,
  image: Ids,
  instruction: Ids,
  instruction_first: bool = False,
) -> Request:
  """Requests an edit of an image by InstructPix2Pix's template (CM3Leon, sections 4.1 and E).

    before = [5], image = [91 92], instruction = [7]. The three streams are:
    </s> 5 <break> 91 92 <break> 7 <break>, </s> 5 <break> 91 92 <break> and </s> <mask:0> <break>

  With `instruction_first`, the first stream is </s> 5 <break> 7 <break> 91 92 <break>. With the
  template chameleon, the second stream has only the image.

  Raises:
    UserError: the instruction is empty, or the image does not have I codes.
  """
  if not len(instruction):
    raise UserError("the instruction is empty: say what to change.")
  _check_image(len(image), image_tokens)
  asked = (instruction, image) if instruction_first else (image, instruction)
  kept = [image] if templates.of(vocab).drops_texts else [before, image]
  streams = (_prompt(vocab, [before, *asked]), _prompt(vocab, kept), unconditional_prompt(vocab))
  return Request(streams, _image_plan(image_tokens))


def instruct(vocab: VocabLayout, image_tokens: int, segments: Sequence[Ids]) -> Request:
  """Requests an image after the segments of an instruction, with one guidance weight.

  See CM3Leon, section 4.1.

    segments = [[5], [91 92], [7]]:
    </s> 5 <break> 91 92 <break> 7 <break>, guided against </s> <mask:0> <break>

  With the template chameleon, a stream of the images alone is between these two, as in `edit`.

  Raises:
    UserError: an image does not have I codes.
  """
  _check_images(vocab, image_tokens, segments)
  images = [segment for segment in segments if _is_image(vocab, [segment])]
  between = (_prompt(vocab, images),) * (templates.of(vocab).drops_texts and bool(images))
  streams = (_prompt(vocab, segments), *between, unconditional_prompt(vocab))
  return Request(streams, _image_plan(image_tokens))


def infill(
  vocab: VocabLayout,
  image_tokens: int,
  segments: Sequence[Pieces],
  neighbors: Sequence[Sequence] = (),
) -> Request:
  """Requests the contents of the holes in a document, which follow at its end as in CM3 training.

    segments = [([7 8],), ([91], Hole(codes=2), [94])]:
    </s> 7 8 <break> 91 <mask:0> 94 </s> <mask:0> ..., then 2 codes and <eoss>
    segments = [(Hole(most_text=9),), ([91 92 93 94],)]: requests a caption

  Each segment is a sequence of ids and holes. `neighbors` are retrieved documents, best first.

  If all holes are in images, the texts guide their codes. The unconditional stream then contains
  only the images: </s> 91 <mask:0> 94 </s> <mask:0>. Both streams continue with the same tokens and
  number their sentinels in document order, as in training.

  Raises:
    UserError: the document has no hole or too many holes, an image does not have I codes, or a hole
      is empty, does not match the kind of its segment, or is next to another hole.
  """
  holes = [piece for segment in segments for piece in segment if isinstance(piece, Hole)]
  if not holes:
    raise UserError("the prompt has no mask to fill in: put a mask into the prompt.")
  if len(holes) >= vocab.num_masks:
    raise UserError(
      f"the prompt has {len(holes)} masks; the vocabulary allows at most {vocab.num_masks - 1}."
    )
  for segment in segments:
    _check_segment(vocab, image_tokens, segment)
  sentinels = map(vocab.mask, range(len(holes)))
  marked = [
    np.concatenate([[next(sentinels)] if isinstance(piece, Hole) else piece for piece in segment])
    for segment in segments
  ]
  before = list(itertools.chain(*neighbors))
  are_images = [_is_image(vocab, segment) for segment in segments]
  kinds = [*(_is_image(vocab, [segment]) for segment in before), *are_images]
  streams: tuple[np.ndarray, ...] = (_infill_prompt(vocab, [*before, *marked], kinds),)
  if all(hole.codes for hole in holes) and not all(are_images):
    images = [segment for is_image, segment in zip(are_images, marked) if is_image]
    streams += (_infill_prompt(vocab, images, [True] * len(images)),)
  plan = []
  for i, hole in enumerate(holes):
    plan.append(Part(grammar.MASK, i))
    if hole.codes:
      plan += [Part(grammar.CODES, hole.codes), Part(grammar.EOSS)]
    else:
      plan.append(Part(grammar.TEXT, hole.most_text))
  return Request(streams, tuple(plan[1:]))  # The first sentinel is part of the prompt.


def continuation(
  vocab: VocabLayout,
  image_tokens: int,
  segments: Sequence[Ids],
  most_text: int,
  neighbors: Sequence[Sequence] = (),
) -> Request:
  """Requests a text of at most `most_text` tokens, and `<eoss>`, after the segments of a prompt.

    template chameleon, segments = [[91 92], [7]]: </s> <break> 91 92 <image_end> 7 <eoss>

  `neighbors` are retrieved documents, best first.

  Raises:
    UserError: an image does not have I codes.
  """
  _check_images(vocab, image_tokens, segments)
  prompt = _prompt(vocab, [*itertools.chain(*neighbors), *segments], templates.WRITTEN)
  return Request((prompt,), (Part(grammar.TEXT, most_text),))


def document(
  vocab: VocabLayout,
  image_tokens: int,
  segments: Sequence[Ids],
  length: int,
  after_break: bool = False,
) -> Request:
  """Requests texts and images in any order, after the segments of a prompt.

  `segments` may be empty. `length` is the largest number of tokens to generate, including the end.
  If `after_break`, the last segment of the prompt is complete and a new segment starts. Otherwise a
  last segment of text is continued.

  Raises:
    UserError: `length` is less than 2, or an image does not have I codes.
  """
  if length < 2:
    raise UserError(f"the length is {length}; it must be at least 2: one token and </s>.")
  _check_images(vocab, image_tokens, segments)
  place = templates.SEGMENT_START
  if continues := bool(len(segments)) and not after_break:
    ends_in_image = _is_image(vocab, [segments[-1]])
    place = templates.AFTER_IMAGE if ends_in_image else templates.IN_TEXT
  prompt = _prompt(vocab, segments, None if continues else templates.WRITTEN)
  return Request((prompt,), (Part(grammar.DOCUMENT, length, place),))


def _prompt(
  vocab: VocabLayout, segments: Sequence[Ids], end: int | None = templates.DRAWN
) -> np.ndarray:
  """Joins the segments of a prompt. For `end`, see `Template.join`."""
  kinds = [_is_image(vocab, [segment]) for segment in segments]
  return templates.of(vocab).join(segments, kinds, end)


def _infill_prompt(
  vocab: VocabLayout, segments: Sequence[Ids], are_images: Sequence[bool]
) -> np.ndarray:
  """Returns a complete document followed by the sentinel of its first hole."""
  joined = templates.of(vocab).join(segments, are_images)
  return np.append(joined, [vocab.mask(0)]).astype(np.int32)


def _image_plan(image_tokens: int) -> tuple[Part, ...]:
  return Part(grammar.CODES, image_tokens), Part(grammar.END)


def _is_image(vocab: VocabLayout, segment: Pieces) -> bool:
  return any(
    piece.codes > 0 if isinstance(piece, Hole) else vocab.is_image(np.asarray(piece)).any()
    for piece in segment
  )


def _check_images(vocab: VocabLayout, image_tokens: int, segments: Sequence[Ids]) -> None:
  for segment in segments:
    if _is_image(vocab, [segment]):
      _check_image(len(segment), image_tokens)


def _check_image(length: int, image_tokens: int) -> None:
  if length != image_tokens:
    raise UserError(
      f"an image in the prompt has {length} codes; images of this model have {image_tokens} codes."
    )


def _check_segment(vocab: VocabLayout, image_tokens: int, segment: Pieces) -> None:
  image = _is_image(vocab, segment)
  for piece in segment:
    if isinstance(piece, Hole):
      if piece.codes < 1 if image else piece.most_text < 1:
        kind, what = ("an image", "a code or more") if image else ("a text", "a token or more")
        raise UserError(
          f"a mask has space for {piece.codes} codes and {piece.most_text} tokens of text: "
          f"a mask in {kind} needs space for {what}."
        )
    elif image != bool(vocab.is_image(np.asarray(piece)).all()) and len(piece):
      raise UserError(
        "a segment of the prompt mixes text and image codes: put them into separate segments."
      )
  if any(isinstance(a, Hole) and isinstance(b, Hole) for a, b in itertools.pairwise(segment)):
    raise UserError("two masks are adjacent, so the end of the first is unknown: use one mask.")
  if image:
    _check_image(sum(p.codes if isinstance(p, Hole) else len(p) for p in segment), image_tokens)
