"""Defines tasks that generate one image."""

# I tokens per image.

from collections.abc import Sequence
import dataclasses

import numpy as np

from cm3leon_jax.config.instructions import EDIT
from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.request import Hole, Request
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.generation.tasks import (
  ALONE_SETTINGS,
  EDITING,
  GUIDANCE,
  IMAGE,
  IMAGE_SETTINGS,
  Decoded,
  GivenImage,
  PartialImage,
  PromptLayout,
  Task,
  decode_segment,
  document_segments,
  has_image,
  split_prompt,
)


@dataclasses.dataclass(frozen=True)
class ImageTask(Task):
  """Base class of the tasks that generate one image."""

  def from_ids(self, layout: PromptLayout, request: Request, ids: np.ndarray) -> Decoded:
    return (layout.vocab.image_codes(ids[layout.vocab.is_image(ids)]),), ()

  def total_rows(self, layout: PromptLayout) -> int:
    """Returns how many rows of codes the task generates."""
    return layout.side

  def partial(
    self, layout: PromptLayout, tokens: np.ndarray, given: np.ndarray | None
  ) -> PartialImage:
    """Repeats the last complete row below it.

    side 4, tokens 5 6 7 8 9 9: 1 complete row, codes 5 6 7 8 in each row
    """
    codes, side = layout.vocab.image_codes(tokens[layout.vocab.is_image(tokens)]), layout.side
    rows = len(codes) // side
    if not rows:
      return PartialImage(0, np.zeros(side * side, np.int32), 0)
    complete = codes[: rows * side].reshape(rows, side)
    below = np.repeat(complete[-1:], side - rows, axis=0)
    whole = np.concatenate([complete, below]).ravel()
    return PartialImage(rows, whole, rows * (layout.resolution // side))


@dataclasses.dataclass(frozen=True)
class TextToImage(ImageTask):
  """Generates an image for a caption.

  Attributes:
    retrieve: number of documents to retrieve. Most training samples had two.
    keep_neighbors: whether the unconditional stream contains the retrieved documents.
  """

  name = "text_to_image"
  required = ("prompt",)
  is_scored = True
  settings = (*GUIDANCE, *IMAGE_SETTINGS)
  prompt: str = ""
  retrieve: int = 2
  keep_neighbors: bool = False

  def _caption(self, layout: PromptLayout) -> np.ndarray:
    return layout.encode(self.prompt)

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    return request.text_to_image(
      layout.vocab, layout.image_tokens, self._caption(layout), neighbors, self.keep_neighbors
    )

  @property
  def settings_label(self) -> str:
    return f"guidance {self.sampling.guidance:g}"

  @property
  def file_stem(self) -> str:
    return f"{super().file_stem}_guidance{self.sampling.guidance:g}_retrieve{self.retrieve}"


@dataclasses.dataclass(frozen=True)
class InfillImage(ImageTask):
  """Generates new content for a box of an image.

  Attributes:
    box: left, top, right, bottom in pixels at the model's resolution. The box excludes column
      `right` and row `bottom`.
    prompt: caption of the whole image; may be empty.
  """

  name = "infill_image"
  required = ("image",)
  settings = (*GUIDANCE, *IMAGE_SETTINGS)
  image: GivenImage = ""
  box: tuple[int, ...] = ()
  prompt: str = ""
  retrieve: int = 0

  def validate(self) -> None:
    super().validate()
    if not self.box:
      raise self.error(
        "task infill_image needs a box, left,top,right,bottom in pixels, but none is given."
      )

  def unread_settings(self) -> tuple[str, ...]:
    return super().unread_settings() + (() if self.prompt.strip() else GUIDANCE)

  def query(self) -> tuple[str, GivenImage]:
    return ("text", self.prompt) if self.prompt.strip() else ("image", self.image)

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    texts = [(layout.encode(self.prompt),)] if self.prompt.strip() else []
    segments = [*texts, self._pieces(layout, image)]
    return request.infill(layout.vocab, layout.image_tokens, segments, neighbors)

  def _pieces(self, layout: PromptLayout, codes: np.ndarray) -> list[np.ndarray | Hole]:
    """Cuts the box out of the codes: one hole if it has full width, otherwise one hole per row."""
    side = layout.side
    left, top, right, bottom = whole_codes(self.box, layout.resolution, side)
    if right - left == side:
      holes = [(top * side, bottom * side)]
    else:
      holes = [(row * side + left, row * side + right) for row in range(top, bottom)]
    if len(holes) >= layout.vocab.num_masks:
      raise UserError(
        f"box is {_listed(self.box)}, which has {len(holes)} rows of codes; the maximum is "
        f"{layout.vocab.num_masks - 1}, unless the box is as wide as the image: choose a smaller "
        "box."
      )
    pieces: list[np.ndarray | Hole] = []
    position = 0
    for start, stop in holes:
      pieces += [codes[position:start], Hole(codes=stop - start)]
      position = stop
    return [p for p in (*pieces, codes[position:]) if isinstance(p, Hole) or len(p)]

  def from_ids(self, layout: PromptLayout, request: Request, ids: np.ndarray) -> Decoded:
    return (decode_segment(layout, document_segments(layout.vocab, request, ids)[-1]),), ()

  def total_rows(self, layout: PromptLayout) -> int:
    _, top, _, bottom = whole_codes(self.box, layout.resolution, layout.side)
    return bottom - top

  def partial(
    self, layout: PromptLayout, tokens: np.ndarray, given: np.ndarray | None
  ) -> PartialImage:
    """Puts the complete rows of the box into the given image."""
    assert given is not None
    codes, side = layout.vocab.image_codes(tokens[layout.vocab.is_image(tokens)]), layout.side
    left, top, right, bottom = whole_codes(self.box, layout.resolution, side)
    places = np.arange(side * side).reshape(side, side)[top:bottom, left:right].ravel()
    rows, whole = len(codes) // (right - left), given.copy()
    done = rows * (right - left)
    whole[places[:done]] = codes[:done]
    return PartialImage(rows, whole)

  @property
  def is_scored(self) -> bool:
    return bool(self.prompt.strip())


@dataclasses.dataclass(frozen=True)
class Edit(ImageTask):
  """Edits an image as the prompt instructs."""

  name = "edit"
  required = ("image", "prompt")
  settings = (*EDITING, *IMAGE_SETTINGS)
  image: GivenImage = ""
  prompt: str = ""

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    before, instruction = layout.encode(EDIT), layout.encode(self.prompt)
    first = layout.instruction_first
    return request.edit(layout.vocab, layout.image_tokens, before, image, instruction, first)


@dataclasses.dataclass(frozen=True)
class Instruct(ImageTask):
  """Generates an image for an instruction of a kind seen in training (docs/tuning.md).

  Attributes:
    prompt: all segments before the generated image, separated by `<break>`. `<image>` represents
      the input image. Example:
      "Make high quality image from canny edge features <break> <image> <break> a red star".
    image: input image; may be empty.
  """

  name = "instruct"
  required = ("prompt",)
  # With the template chameleon and an image, guidance has the streams and weights of `Edit`.
  settings = (*dict.fromkeys((*GUIDANCE, *EDITING)), *IMAGE_SETTINGS)
  prompt: str = ""
  image: GivenImage = ""

  def unread_settings(self) -> tuple[str, ...]:
    alone = () if has_image(self) else tuple(x for x in EDITING if x not in GUIDANCE)
    return (*super().unread_settings(), *alone)

  def validate(self) -> None:
    super().validate()
    segments = split_prompt(self)
    if has_image(self) and IMAGE not in segments:
      raise self.error(f"an image is given, but the prompt '{self.prompt}' has no {IMAGE} for it.")

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    segments = [
      image if segment == IMAGE else layout.encode(segment) for segment in split_prompt(self)
    ]
    return request.instruct(layout.vocab, layout.image_tokens, segments)


@dataclasses.dataclass(frozen=True)
class Unconditional(ImageTask):
  """Generates an image without a prompt."""

  name = "unconditional"
  settings = ALONE_SETTINGS

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    return request.unconditional(layout.vocab, layout.image_tokens)


def whole_codes(box: Sequence, resolution: int, side: int) -> tuple[int, int, int, int]:
  """Expands a box of pixels to whole codes. Returns (left, top, right, bottom) in codes.

    whole_codes((3, 0, 9, 4), resolution=16, side=8) = (1, 0, 5, 2)

  Raises:
    UserError: the box is not four whole numbers, is empty, or is not within the image.
  """
  if len(box) != 4 or not all(isinstance(x, int) and 0 <= x <= resolution for x in box):
    raise UserError(
      f"box is {_listed(box)}; it must be left, top, right, bottom in pixels: whole numbers from 0 "
      f"to {resolution}."
    )
  left, top, right, bottom = box
  if left >= right or top >= bottom:
    raise UserError(f"box is {_listed(box)}, which is empty.")
  pixels = resolution // side
  return left // pixels, top // pixels, -(-right // pixels), -(-bottom // pixels)


def _listed(box: Sequence) -> str:
  return ",".join(map(short, box))
