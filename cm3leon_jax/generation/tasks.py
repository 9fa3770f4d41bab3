"""The base of all tasks: what a user asks for, its request, and what the generated ids mean.

A task is one frozen dataclass in `image_tasks` or `text_tasks`; `prompt_file.TASKS` collects them.
"""

# I tokens of an image, G generated tokens, H height, W width.

from collections.abc import Callable, Sequence
import dataclasses
import math
import pathlib
import re
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
from PIL import Image

from cm3leon_jax.config import UserError, short
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.data.rows.cm3 import undo_cm3_mask
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.sampling.methods import (
  METHODS,
  settings_of_codes,
  unread_settings,
  without_unconditional,
)
from cm3leon_jax.trained.run import Run
from cm3leon_jax.vocab import VocabLayout

GivenImage: TypeAlias = str | Image.Image | np.ndarray  # A path, or uint8 [H, W, 3].
TextOrImage: TypeAlias = str | np.ndarray  # A text, or an image: its codes or its pixels.
Decoded: TypeAlias = tuple[tuple[TextOrImage, ...], tuple[str, ...]]  # See `Task.from_ids`.
# What a user writes in a prompt: a hole in a text, the end of a segment, the given image.
MASK, BREAK, IMAGE = "<mask>", "<break>", "<image>"
# Fields of SamplingConfig that tasks read beside TEXT_SETTINGS: of image codes, without a stream to
# contrast with, and of their guidance.
IMAGE_SETTINGS = settings_of_codes(unconditional=True)
ALONE_SETTINGS = settings_of_codes(unconditional=False)
GUIDANCE = ("guidance", "guidance_schedule")
EDITING = ("image_guidance", "edit_guidance", "guidance_schedule")


@dataclasses.dataclass(frozen=True)
class PromptLayout:
  """The properties of a run that requests depend on.

  Attributes:
    vocab: names the special tokens.
    image_tokens: I.
    resolution: side of images in pixels.
    positions: longest sample of training.
    encode: text -> [T] int32 ids.
    decode: ids -> text.
    longest_token: largest number of characters of a token of text; 0: not known.
  """

  vocab: VocabLayout
  image_tokens: int
  resolution: int
  positions: int
  encode: Callable[[str], np.ndarray]
  decode: Callable[[Sequence[int] | np.ndarray], str]
  longest_token: int = 0

  @classmethod
  def of(cls, run: Run) -> "PromptLayout":
    """Reads the text tokenizer of a run. Raises UserError if there is none."""
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
    )

  @property
  def most_characters(self) -> int | None:
    """Returns how many characters a prompt has at most, tags included; None: not known."""
    longest = max(self.longest_token, *map(len, (MASK, BREAK, IMAGE)))
    return self.positions * longest if self.longest_token else None

  @property
  def side(self) -> int:
    """Returns the number of codes in a row of an image."""
    return math.isqrt(self.image_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What a user asks for.

  A subclass declares the fields that it takes, and what its prompts and its answer look like.

  Attributes:
    name: as `--task` has it.
    required: fields that must not be empty.
    settings: fields of SamplingConfig that it reads.
    numbers_images: it may make any number of images, whose files are numbered.
    crop: how its image becomes square, see `RawConfig.crop`.
    seed: of its first sample.
    sampling: how tokens are sampled.
    row: its row on the contact sheet; tasks of one row differ only in their settings.
    where: its place in a prompt file, for messages, e.g. "my.jsonl, line 3"; "" elsewhere.
  """

  name: ClassVar[str]
  required: ClassVar[tuple[str, ...]] = ()
  settings: ClassVar[tuple[str, ...]] = ()
  numbers_images: ClassVar[bool] = False
  crop: ClassVar[str] = "center"
  # Values of the fields that a subclass does not declare; annotations would make fields of them.
  prompt = ""
  image = cast("GivenImage", "")
  box = cast("tuple[int, ...]", ())
  length = 0
  retrieve = 0
  keep_neighbors = False
  neighbors = cast("tuple[Document, ...] | None", None)  # None: they are searched for.
  original = cast("np.ndarray | None", None)  # A held-out image, for the contact sheet.

  seed: int = 0
  sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (frozen)
  row: int = 0
  where: str = ""

  @property
  def key(self) -> str:
    """Returns the name of a held-out document; "" of other tasks."""
    return ""

  @property
  def concept(self) -> str:
    """Returns the concept of a held-out document; "" of other tasks."""
    return ""

  def error(self, sentence: object) -> UserError:
    """Returns an error that names the task's place in a prompt file."""
    return UserError(f"{self.where}: {sentence}" if self.where else str(sentence))

  def validate(self) -> None:
    """Raises UserError if a required field is empty or a field is out of range."""
    if not isinstance(self.prompt, str):
      raise self.error(f"the prompt is {short(self.prompt)}; it must be a text.")
    if any("\ud800" <= c <= "\udfff" for c in self.prompt):
      raise self.error(
        f"the prompt {short(self.prompt)} holds half of a surrogate pair: write it as UTF-8."
      )
    for field in self.required:
      value = getattr(self, field)
      if isinstance(value, str) and not value.strip():
        article = "an" if field == "image" else "a"
        raise self.error(f"task {self.name} needs {article} {field}, and none is given.")
    self._check_masks()
    for field in ("length", "retrieve", "seed"):
      value = getattr(self, field)
      if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise self.error(f"{field} is {short(value)}; it must be a whole number.")
      if not 0 <= value < 2**32:
        raise self.error(f"{field} is {short(value)}; it must lie in [0, 2^32).")

  def unread_settings(self) -> tuple[str, ...]:
    """Returns the fields of `settings` that have no effect with this task's other fields."""
    name = self.sampling.method
    return (*unread_settings(name), *(() if METHODS[name].is_guided else (*GUIDANCE, *EDITING)))

  def _check_masks(self) -> None:
    if MASK in self.prompt:
      raise self.error(
        f"the prompt '{self.prompt}' has a {MASK}, which only task infill_text takes; this one is "
        f"{self.name}."
      )

  def identity(self) -> dict[str, Any]:
    """Returns the name and the fields that the samples depend on."""
    fields = dataclasses.asdict(self)
    del fields["where"]
    return {"task": self.name, **fields}

  def query(self) -> tuple[str, GivenImage]:
    """Returns the query of retrieval: ("text", text) or ("image", image)."""
    return ("image", self.image) if has_image(self) else ("text", self.prompt)

  def to_request(
    self,
    layout: PromptLayout,
    image: np.ndarray | None = None,
    neighbors: Sequence[Document] = (),
  ) -> Request:
    """Returns the prompts of the guidance streams and the plan of what may follow.

    Args:
      layout: of the run.
      image: [I] codes of the given image; None: no image, or zeros in its place.
      neighbors: retrieved documents, best first.

    Raises:
      UserError: naming the task's place: more positions than were trained, a box outside the image,
        or a method that needs an unconditional stream, and there is none.
    """
    most = layout.most_characters
    if most is not None and len(self.prompt) > most:  # Encoding it would take minutes.
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
        hints += ["ask for a smaller length"] * ("length" in fields and self.length != 1)
        hints += ["retrieve fewer documents"] * bool(neighbors)
        raise UserError(
          f"the prompt has {request.positions - following} tokens and up to {following} follow; "
          f"the model was trained on {layout.positions} positions: {', or '.join(hints)}."
        )
      makes_images = any(part.kind in (grammar.CODES, grammar.DOCUMENT) for part in request.plan)
      name = self.sampling.method
      if makes_images and METHODS[name].needs_unconditional and len(request.streams) == 1:
        raise UserError(
          f"sampling.method is '{name}', which contrasts with a stream without the prompt, and "
          f"task {self.name} has one stream here: set it to {' or '.join(without_unconditional())}."
        )
      return request
    except UserError as error:
      raise self.error(error) from error

  def _request(self, layout: PromptLayout, image: np.ndarray, neighbors: list) -> Request:
    """Makes the request (`to_request`) for [I] ids of the image and the neighbors' segments."""
    raise NotImplementedError

  def from_ids(self, layout: PromptLayout, request: Request, ids: np.ndarray) -> Decoded:
    """Decodes [G] generated ids.

    Returns:
      (segments: texts and [I] int32 image codes in their order; texts of all holes).
    """
    raise NotImplementedError

  @property
  def is_scored(self) -> bool:
    """Returns whether CLIP can score a sample: whether it has a caption and an image."""
    return False

  def clip_pair(
    self, given: np.ndarray | None, segments: Sequence[TextOrImage]
  ) -> tuple[np.ndarray, str]:
    """Returns the image and the caption that CLIP compares, if `is_scored`.

    Args:
      given: [H, W, 3] uint8, the given image or None.
      segments: of the sample, images as [H, W, 3] uint8.
    """
    image = segments[0]
    assert not isinstance(image, str)
    return image, self.prompt

  @property
  def label(self) -> str:
    """Returns the label of its row on the contact sheet."""
    return self.prompt or (has_image(self) and image_name(self.image)) or self.name

  @property
  def settings_label(self) -> str:
    """Returns the settings that differ in a row of the contact sheet."""
    return ""

  @property
  def file_stem(self) -> str:
    """Returns the start of the names of its image files."""
    return f"{self.row:03d}_{slug(self.prompt or self.name)}"

  def record(
    self,
    segments: Sequence[TextOrImage],
    codes: Sequence[np.ndarray],
    filled: Sequence[str],
    files: list[str],
  ) -> dict[str, Any]:
    """Returns the answer of a sample for results.jsonl: texts, codes and files."""
    raise NotImplementedError


def split_prompt(task: Task) -> list[str]:
  """Splits a prompt into its segments, texts and IMAGE.

    "Question: what is it? <break> <image>": ["Question: what is it?", "<image>"]

  Raises:
    UserError: an empty segment, or IMAGE in a text, without an image, or twice.
  """
  segments = [segment.strip() for segment in task.prompt.split(BREAK)]
  if not all(segments):
    raise task.error(f"the prompt '{task.prompt}' has an empty segment beside a {BREAK}.")
  if any(IMAGE in segment and segment != IMAGE for segment in segments):
    raise task.error(f"the prompt '{task.prompt}' has {IMAGE} in a text: put {BREAK} between them.")
  count = segments.count(IMAGE)
  if count > 1 or (count and not has_image(task)):
    given = "one image" if has_image(task) else "no image"
    raise task.error(f"the prompt '{task.prompt}' has {count} {IMAGE}, and {given} is given.")
  return segments


def has_image(task: Task) -> bool:
  """Returns whether the task has an input image."""
  return not isinstance(task.image, str) or bool(task.image)


def image_name(image: GivenImage) -> str:
  """Returns the name of an image file, or the type of an image in memory."""
  return pathlib.PurePath(image).name if isinstance(image, str) else "image"


def document_segments(vocab: VocabLayout, request: Request, ids: np.ndarray) -> list[np.ndarray]:
  """Splits the document of a request into segments, with [G] generated ids in their place."""
  whole = np.concatenate([request.streams[0], ids]).astype(np.int32)
  whole = undo_cm3_mask(whole, vocab) if vocab.eoss in whole else whole
  parts = np.split(whole, np.flatnonzero((whole == vocab.brk) | (whole == vocab.eos)))
  return [segment for part in parts if len(segment := part[1:])]


def decode_segment(layout: PromptLayout, segment: np.ndarray) -> TextOrImage:
  """Decodes the ids of a segment to its text or its [I] image codes."""
  vocab = layout.vocab
  return vocab.image_codes(segment) if vocab.is_image(segment).all() else layout.decode(segment)


def slug(text: str) -> str:
  """Turns a text into a part of a file name.

  >>> slug("Red  apple!")
  'red-apple'
  """
  return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"
