"""Defines the base class of tasks. A task makes a request, and decodes the generated ids.

Each task is a frozen dataclass in `image_tasks` or `text_tasks`; `prompt_file.TASKS` lists them.
"""

# I tokens per image, G generated tokens, H height, W width.

from collections.abc import Callable, Sequence
import dataclasses
import math
import operator
import pathlib
import re
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
from PIL import Image

from cm3leon_jax import templates
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.rows.cm3 import undo_cm3_mask
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling.methods import (
  WITHOUT_UNCONDITIONAL,
  is_guided,
  settings_of_codes,
  unread_settings,
)
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.run.run import Run
from cm3leon_jax.vocab import VocabLayout

GivenImage: TypeAlias = str | Image.Image | np.ndarray  # A path, or uint8 [H, W, 3].
TextOrImage: TypeAlias = str | np.ndarray  # A text, or an image as codes or pixels.
Decoded: TypeAlias = tuple[tuple[TextOrImage, ...], tuple[str, ...]]  # See `Task.from_ids`.
# Marks in a prompt: a hole in a text, the end of a segment, the input image.
MASK, BREAK, IMAGE = "<mask>", "<break>", "<image>"
# Fields of SamplingConfig that tasks use in addition to TEXT_SETTINGS: for image codes with an
# unconditional stream, for image codes without one, for guidance, and for the guidance of edits.
IMAGE_SETTINGS = settings_of_codes(unconditional=True)
ALONE_SETTINGS = settings_of_codes(unconditional=False)
GUIDANCE = ("guidance", "guidance_schedule")
TO_COME = 160  # Gray value of rows that are not generated yet.
EDITING = ("image_guidance", "edit_guidance", "guidance_schedule")


@dataclasses.dataclass(frozen=True)
class PromptLayout:
  """Properties of a run that requests depend on.

  Attributes:
    image_tokens: I, the number of tokens per image.
    resolution: side of images in pixels.
    positions: number of positions in training, the maximum length of a sample.
    encode: maps a text to token ids, int32 [T].
    decode: maps token ids to a text.
    longest_token: number of characters of the longest text token; 0 if unknown.
    instruction_first: whether the instruction of an edit comes before the input image.
  """

  vocab: VocabLayout
  image_tokens: int
  resolution: int
  positions: int
  encode: Callable[[str], np.ndarray]
  decode: Callable[[Sequence[int] | np.ndarray], str]
  longest_token: int = 0
  instruction_first: bool = False

  @classmethod
  def of(cls, run: Run) -> "PromptLayout":
    """Makes the layout of a run. Raises UserError if the run has no text tokenizer."""
    settings, tokenizer = run.settings, run.text
    vqgan = settings.vqgan
    return cls(
      settings.vocab,
      vqgan.image_tokens,
      vqgan.resolution,
      settings.data.sequence_length,
      tokenizer.encode,
      tokenizer.decode,
      tokenizer.longest_token,
      settings.instructions.instruction_first,
    )

  @property
  def most_characters(self) -> int | None:
    """Maximum number of characters in a prompt, including its marks; None if unknown."""
    longest = max(self.longest_token, *map(len, (MASK, BREAK, IMAGE)))
    return self.positions * longest if self.longest_token else None

  @property
  def side(self) -> int:
    """Number of codes per row of an image."""
    return math.isqrt(self.image_tokens)


@dataclasses.dataclass(frozen=True)
class PartialImage:
  """Preview of an image during generation.

  The decoder of the image tokenizer is not causal: pixels of a complete row still change a little
  when the rows below it are generated.

  Attributes:
    rows: number of complete rows of codes of the image, or of the box of an infill.
    codes: [I] codes, with missing rows filled in.
    gray_from: first row of pixels that is not generated yet and shown gray; None: no row.
  """

  rows: int
  codes: np.ndarray
  gray_from: int | None = None

  def shown(self, pixels: np.ndarray) -> np.ndarray:
    """Grays out the rows of the decoded codes, [H, W, 3] uint8, that are not generated yet."""
    if self.gray_from is None:
      return pixels
    shown = pixels.copy()
    shown[self.gray_from :] = TO_COME
    return shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Base class of tasks that a user can request.

  A subclass declares its fields, makes the prompts, and decodes the answer.

  Attributes:
    name: value of the flag `--task`.
    required: fields that must not be empty.
    settings: fields of SamplingConfig that the task uses.
    numbers_images: whether a sample can have several images, so that image files are numbered.
    crop: how the input image becomes square, see `RawConfig.crop`.
    seed: seed of the first sample.
    row: row of the contact sheet. Tasks in the same row differ only in their settings.
    where: the task's place in a prompt file, e.g. "my.jsonl, line 3"; "" without a prompt file.
  """

  name: ClassVar[str]
  required: ClassVar[tuple[str, ...]] = ()
  settings: ClassVar[tuple[str, ...]] = ()
  numbers_images: ClassVar[bool] = False
  crop: ClassVar[str] = "center"
  # Default values of fields that a subclass does not declare. They have no annotations, because
  # annotations would make them dataclass fields.
  prompt = ""
  image = cast("GivenImage", "")
  box = cast("tuple[int, ...]", ())
  length = 0
  retrieve = 0
  keep_neighbors = False
  neighbors = cast("tuple[Document, ...] | None", None)  # None: retrieves from the bank.
  original = cast("np.ndarray | None", None)  # Original of a held-out image.

  seed: int = 0
  sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (frozen)
  row: int = 0
  where: str = ""

  @property
  def key(self) -> str:
    """Key of the held-out document; "" for other tasks."""
    return ""

  @property
  def concept(self) -> str:
    """Concept of the held-out document; "" for other tasks."""
    return ""

  def error(self, sentence: object) -> UserError:
    """Makes a UserError whose message starts with the task's place in the prompt file, if any."""
    return UserError(f"{self.where}: {sentence}" if self.where else str(sentence))

  def validate(self) -> None:
    """Raises UserError if a required field is empty, or a field has an invalid value."""
    if any("\ud800" <= c <= "\udfff" for c in self.prompt):
      raise self.error(
        f"the prompt {short(self.prompt)} has half of a surrogate pair: write it as UTF-8."
      )
    for field in self.required:
      value = getattr(self, field)
      if isinstance(value, str) and not value.strip():
        raise self.error(f"task {self.name} needs the field {field}, but it is not given.")
    self._check_masks()
    for field in ("length", "retrieve", "seed"):
      value = getattr(self, field)
      if not 0 <= operator.index(value) < 2**32:
        raise self.error(f"{field} is {short(value)}; it must lie in [0, 2^32).")

  def unread_settings(self) -> tuple[str, ...]:
    """Returns the fields in `settings` that have no effect with the other fields of the task."""
    name = self.sampling.method
    return (*unread_settings(name), *(() if is_guided(name) else (*GUIDANCE, *EDITING)))

  def _check_masks(self) -> None:
    if MASK in self.prompt:
      raise self.error(
        f"the prompt '{self.prompt}' has a {MASK}, which only task infill_text takes; this task is "
        f"{self.name}."
      )

  def identity(self) -> dict[str, Any]:
    """Returns the name of the task and the fields that determine its samples."""
    fields = dataclasses.asdict(self)
    del fields["where"]
    return {"task": self.name, **fields}

  def query(self) -> tuple[str, GivenImage]:
    """Returns the query for retrieval: ("text", text) or ("image", image)."""
    return ("image", self.image) if has_image(self) else ("text", self.prompt)

  def to_request(
    self,
    layout: PromptLayout,
    image: np.ndarray | None = None,
    neighbors: Sequence[Document] = (),
  ) -> Request:
    """Returns the request: the prompts of all guidance streams, and what may follow them.

    `image` contains the codes [I] of the input image. If it is None, zeros replace the codes.

    Raises:
      UserError: the request has more positions than the model was trained on, the box is outside
        the image, or the sampling method needs an unconditional stream that the task does not have.
    """
    most = layout.most_characters
    if most is not None and len(self.prompt) > most:  # Encoding a longer prompt would take minutes.
      raise self.error(
        f"the prompt has {len(self.prompt):,} characters; the model was trained on "
        f"{layout.positions} positions, which {most:,} fill at most: shorten the prompt."
      )
    image = np.zeros(layout.image_tokens, np.int32) if image is None else image
    fields = {field.name for field in dataclasses.fields(self)}
    before = [[segment.tokens for segment in document.segments] for document in neighbors]
    try:
      request = self._request(layout, layout.vocab.image_ids(image), before)
      following = grammar.max_new_tokens(request.plan)
      if request.positions > layout.positions:
        hints = ["shorten the prompt"]
        hints += ["set a smaller length"] * ("length" in fields and self.length != 1)
        hints += ["retrieve fewer documents"] * bool(neighbors)
        raise UserError(
          f"the prompt has {request.positions - following} tokens and up to {following} follow; "
          f"the model was trained on {layout.positions} positions: {', or '.join(hints)}."
        )
      makes_images = any(part.kind in (grammar.CODES, grammar.DOCUMENT) for part in request.plan)
      name = self.sampling.method
      if makes_images and name not in WITHOUT_UNCONDITIONAL and len(request.streams) == 1:
        raise UserError(
          f"sampling.method is '{name}', which needs a second stream without the prompt, but task "
          f"{self.name} has only one stream here: set sampling.method to "
          f"{' or '.join(WITHOUT_UNCONDITIONAL)}."
        )
      return request
    except UserError as error:
      raise self.error(error) from error

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    """Makes the request from the token ids [I] of the image and the segments of the neighbors."""
    raise NotImplementedError

  def from_ids(self, layout: PromptLayout, request: Request, ids: np.ndarray) -> Decoded:
    """Decodes ids [G]. Returns (texts and image codes, int32 [I], in order; texts of all holes)."""
    raise NotImplementedError

  def partial(
    self, layout: PromptLayout, tokens: np.ndarray, given: np.ndarray | None
  ) -> "PartialImage | str":
    """Returns a preview of a sample from the ids [G] so far: rows of its image, or its text.

    `given` contains the codes [I] of the input image.
    """
    raise NotImplementedError

  @property
  def is_scored(self) -> bool:
    """Whether CLIP can score the samples. See `Pipeline.samples`."""
    return False

  @property
  def label(self) -> str:
    """Label of the task's row on the contact sheet."""
    return self.prompt or (has_image(self) and image_name(self.image)) or self.name

  @property
  def settings_label(self) -> str:
    """Settings, except `retrieve`, that differ within a row of the contact sheet, as text."""
    return ""

  @property
  def file_stem(self) -> str:
    """Beginning of the names of the task's image files."""
    return f"{self.row:03d}_{slug(self.prompt or self.name)}"


def split_prompt(task: Task) -> list[str]:
  """Splits a prompt into its segments: texts and IMAGE.

    "Question: what is it? <break> <image>" -> ["Question: what is it?", "<image>"]

  Raises:
    UserError: a segment is empty, or IMAGE occurs within a text, twice, or without an input image.
  """
  segments = [segment.strip() for segment in task.prompt.split(BREAK)]
  if not all(segments):
    raise task.error(f"the prompt '{task.prompt}' has an empty segment next to a {BREAK}.")
  if any(IMAGE in segment and segment != IMAGE for segment in segments):
    raise task.error(f"the prompt '{task.prompt}' has {IMAGE} in a text: put {BREAK} between them.")
  count = segments.count(IMAGE)
  if count > 1 or (count and not has_image(task)):
    given = "one image" if has_image(task) else "no image"
    raise task.error(f"the prompt '{task.prompt}' has {count} {IMAGE}, but {given} is given.")
  return segments


def has_image(task: Task) -> bool:
  """Returns whether the task has an input image."""
  return not isinstance(task.image, str) or bool(task.image)


def image_name(image: GivenImage) -> str:
  """Returns the name of an image file, or the type of an image in memory."""
  return pathlib.PurePath(image).name if isinstance(image, str) else "image"


def document_segments(vocab: VocabLayout, request: Request, ids: np.ndarray) -> list[np.ndarray]:
  """Inserts generated ids [G] into the document of a request, and splits it into segments."""
  whole = np.concatenate([request.streams[0], ids]).astype(np.int32)
  whole = undo_cm3_mask(whole, vocab) if vocab.eoss in whole else whole
  parts = np.split(whole, np.flatnonzero(np.isin(whole, templates.of(vocab).separators)))
  return [segment for part in parts if len(segment := part[1:])]


def decode_segment(layout: PromptLayout, segment: np.ndarray) -> TextOrImage:
  """Decodes the ids of a segment into a text, or into image codes [I]."""
  vocab = layout.vocab
  return vocab.image_codes(segment) if vocab.is_image(segment).all() else layout.decode(segment)


def slug(text: str) -> str:
  """Converts a text to a part of a file name.

  >>> slug("Red  apple!")
  'red-apple'
  """
  return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"
