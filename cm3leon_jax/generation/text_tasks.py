"""Defines tasks that write text: captions, answers, infilled texts, and interleaved documents."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.request import Hole, Request
from cm3leon_jax.decoding.sampling.methods import TEXT_SETTINGS
from cm3leon_jax.generation.tasks import (
  ALONE_SETTINGS,
  IMAGE,
  MASK,
  Decoded,
  GivenImage,
  PromptLayout,
  Task,
  decode_segment,
  document_segments,
  has_image,
  split_prompt,
)
from cm3leon_jax.tokenizers.text import encode_pieces

TEXT_LENGTH = 64  # Default maximum number of tokens per hole.
QUESTION = f"Question: {{}} Answer: {MASK}."  # CM3Leon, table 5.


@dataclasses.dataclass(frozen=True)
class TextTask(Task):
  """Base class of the tasks that fill the holes of a text.

  The document is the text, followed by the input image if there is one. `length` is the maximum
  number of tokens per hole; 0 means TEXT_LENGTH. If `may_follow`, the text follows the image and
  the prompt instead, with a template whose captions follow.
  """

  settings = TEXT_SETTINGS
  may_follow: ClassVar[bool] = False
  retrieve: int = dataclasses.field(default=0, kw_only=True)
  length: int = dataclasses.field(default=0, kw_only=True)

  def _text(self) -> str:
    """Returns the text of the document, in which MASK represents a hole."""
    return self.prompt

  def _follows(self, layout: PromptLayout) -> bool:
    """Returns whether the text follows image and prompt, instead of filling a hole."""
    return self.may_follow and templates.of(layout.vocab).captions_follow

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    most = self.length or TEXT_LENGTH
    if self._follows(layout):
      asked = [layout.encode(self.prompt)] if self.prompt.strip() else []
      return request.continuation(
        layout.vocab, layout.image_tokens, [image, *asked], most, neighbors
      )
    hole = Hole(most_text=most)
    segments = [
      (image,) if text == IMAGE else _with_holes(layout.encode, text, hole)
      for text in self._texts()
    ]
    return request.infill(layout.vocab, layout.image_tokens, segments, neighbors)

  def _texts(self) -> list[str]:
    """Returns the texts of the document, followed by IMAGE if there is an image."""
    return [self._text(), IMAGE] if has_image(self) else [self._text()]

  def from_ids(self, layout: PromptLayout, request: Request, ids: np.ndarray) -> Decoded:
    vocab = layout.vocab
    holes = np.split(ids, np.flatnonzero(ids == vocab.eoss))
    filled = [layout.decode(hole).strip() for hole in holes if (hole >= vocab.num_special).any()]
    if self._follows(layout):
      return tuple(filled), tuple(filled)
    count = len(self._texts())
    whole = document_segments(vocab, request, ids)[-count:]
    texts = zip(self._texts(), whole, strict=True)
    shown: list[Any] = [decode_segment(layout, ids) for text, ids in texts if text != IMAGE]
    return ("\n".join(shown),), tuple(filled)

  def partial(self, layout: PromptLayout, tokens: np.ndarray, given: np.ndarray | None) -> str:
    """Leaves out an incomplete last character."""
    vocab = layout.vocab
    ends = np.flatnonzero(tokens < vocab.num_special)
    first = tokens[: ends[0]] if len(ends) else tokens
    return layout.decode(first).strip().rstrip("\ufffd")


@dataclasses.dataclass(frozen=True)
class Caption(TextTask):
  """Writes a caption of an image."""

  name = "caption"
  may_follow = True
  required = ("image",)
  is_scored = True
  image: GivenImage = ""

  def _text(self) -> str:
    return MASK


@dataclasses.dataclass(frozen=True)
class Question(TextTask):
  """Answers a question about an image."""

  name = "question"
  may_follow = True
  required = ("prompt", "image")
  image: GivenImage = ""
  prompt: str = ""

  def _text(self) -> str:
    return QUESTION.format(self.prompt.strip())

  def from_ids(self, layout: PromptLayout, request: Request, ids: np.ndarray) -> Decoded:
    _, filled = super().from_ids(layout, request, ids)
    return filled[:1], filled


@dataclasses.dataclass(frozen=True)
class InfillText(TextTask):
  """Fills the masks of a text.

  Attributes:
    prompt: text with `<mask>` for each hole. `<break>` ends a segment, and `<image>` represents the
      input image.
    image: input image; may be empty. It follows the text if the prompt has no `<image>`.
  """

  name = "infill_text"
  required = ("prompt",)
  prompt: str = ""
  image: GivenImage = ""

  def validate(self) -> None:
    super().validate()
    split_prompt(self)

  def partial(self, layout: PromptLayout, tokens: np.ndarray, given: np.ndarray | None) -> str:
    """Shows nothing: the text is complete only when all holes are filled."""
    return ""

  def query(self) -> tuple[str, GivenImage]:
    kind, value = super().query()
    if kind == "text" and isinstance(value, str):
      return kind, value.replace(MASK, " ").strip()
    return kind, value

  def _texts(self) -> list[str]:
    segments = split_prompt(self)
    return [*segments, IMAGE] if has_image(self) and IMAGE not in segments else segments

  def _check_masks(self) -> None:
    if MASK not in self.prompt:
      raise self.error(
        f"task infill_text fills in each {MASK}: add a {MASK} to the prompt '{self.prompt}'."
      )


@dataclasses.dataclass(frozen=True)
class Interleaved(Task):
  """Generates a document of texts and images.

  Attributes:
    prompt: beginning of the document; may be empty.
    length: maximum number of tokens; 0 means as many as fit in a training sample.
  """

  name = "interleaved"
  numbers_images = True
  settings = (*ALONE_SETTINGS, *TEXT_SETTINGS)
  prompt: str = ""
  length: int = 0

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    texts = [layout.encode(self.prompt)] if self.prompt.strip() else []
    left = layout.positions - 1 - sum(map(len, texts))
    length = self.length or max(left, 2)
    return request.document(layout.vocab, layout.image_tokens, texts, length)

  def from_ids(self, layout: PromptLayout, request: Request, ids: np.ndarray) -> Decoded:
    segments = document_segments(layout.vocab, request, ids)
    return tuple(decode_segment(layout, segment) for segment in segments), ()


def _with_holes(
  encode: Callable[[str], np.ndarray], text: str, hole: Hole
) -> list[np.ndarray | Hole]:
  """Encodes a text as pieces of a segment, with a hole for each mask."""
  first, *others = text_pieces(encode, text)
  segment: list[np.ndarray | Hole] = [first] if len(first) else []
  for piece in others:
    segment += [hole, piece] if len(piece) else [hole]
  return segment


def text_pieces(encode: Callable[[str], np.ndarray], text: str) -> list[np.ndarray]:
  """Encodes the parts of a text between its masks as they would be encoded in the filled text.

  "a <mask> on it." -> the token ids of " a", and those of " on it."
  """
  return encode_pieces(encode, text.split(MASK))
