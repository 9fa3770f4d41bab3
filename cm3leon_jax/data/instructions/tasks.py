"""Declares tasks of instruction tuning, and joins records by their templates into documents.

A task is data: templates with named fields, and the field that is to be predicted. An answer that
stands before the image is the CM3 span of its document, as in the paper (CM3Leon, section 4 and
table 5); an image that ends the document is predicted in its place.
"""

# I codes of an image, T tokens of a document.

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import re
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, ValidationInfo, field_validator
import pydantic.dataclasses

from cm3leon_jax.config import STRICT, UserError
from cm3leon_jax.data.documents.store import Segment
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.sources.records import RecordError
from cm3leon_jax.tokenizers.text import encode_pieces

BREAK = "<break>"  # Between the segments of a template.
SCENES = "scenes/"  # In a format, before the name of a task that is drawn, see `DrawnTasks`.
_FIELD = re.compile(r"\{(\w+)(\??)\}")


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class InstructionTask:
  """One task; the templates of a record are chosen by its key, each as often."""

  name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
  """Unique name."""
  templates: Annotated[tuple[str, ...], Field(min_length=1)]
  """Texts and images in their order: `{field}` is a field of the records, `<break>` separates
  segments, and an image is a segment of its own. A line with `{field?}` is left out if this text
  is empty in a record."""
  target: Annotated[str, Field(min_length=1)]
  """Field that is to be predicted."""
  format: Annotated[str, Field(min_length=1)]
  """Format of the records: `scenes/TASK`, or one of docs/data_formats.md#instruction-files."""
  train: Annotated[str, Field(min_length=1)] = "train"
  """Split that is trained on."""
  heldout: str = ""
  """Split of the held-out loss; "": none."""
  root: str = ""
  """Folder of the files, in `config.instructions.root`."""
  images: str = ""
  """Folder of the images, in `config.instructions.root`; "": `root`."""
  maps: dict[str, str] = dataclasses.field(default_factory=dict)
  """More images of a record, by their fields: `canny` or `scribble`, which are computed, or a
  folder in `config.instructions.root` with a map under the file name of each image."""
  records: NonNegativeInt = 0
  """Most records that are trained on, the first ones; 0: all. `scenes` needs a number."""
  heldout_records: NonNegativeInt = 500
  """Most held-out records, the first ones; 0: all."""
  weight: NonNegativeFloat = 1.0
  """Factor of its share of the mixture."""
  cap: NonNegativeInt = 0
  """Largest number of records that counts for its share; 0: all."""
  loss_weight: Annotated[float, Field(gt=0)] = 1.0
  """Weight of each of its targets in the loss. An answer has few tokens, an image has many."""
  drop_instruction: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of samples without the segment before the target, a text, for guidance by the given
  image alone. Only samples that predict an image lack something."""
  drop_all: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of samples in which `<mask:0>` stands for all that is before the target."""

  # Validators of fields, not of the whole, so that an error has the field's place in a file.
  @field_validator("templates")
  @classmethod
  def _check_segments(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
      if set("{}") & set(_FIELD.sub("", template)):
        raise ValueError(
          f"the template '{template}' has a brace that belongs to no field: write {{name}}."
        )
      if not all(split_template(template)):
        raise ValueError(f"the template '{template}' has an empty segment beside a {BREAK}.")
      for line in template.replace(BREAK, "\n").split("\n"):
        if any(mark for _, mark in _FIELD.findall(line)) and len(fields_of(line)) > 1:
          raise ValueError(
            f"the template '{template}' has an optional field beside another one: give it a line "
            "of its own."
          )
    return templates

  @field_validator("target")
  @classmethod
  def _check_target(cls, target: str, info: ValidationInfo) -> str:
    for template in info.data.get("templates", ()):
      given = f"{{{target}}}" in template  # Not as an optional field.
      count = fields_of(template).count(target) if given else 0
      if count != 1:
        raise ValueError(
          f"the template '{template}' must have {{{target}}}, the target, once; it has it {count} "
          "times."
        )
    return target

  @field_validator("drop_all")
  @classmethod
  def _check_drops(cls, drop_all: float, info: ValidationInfo) -> float:
    if drop_all + info.data.get("drop_instruction", 0) > 1:
      raise ValueError("drop_instruction and drop_all together are more than 1.")
    return drop_all


def fields_of(template: str) -> list[str]:
  """Returns the names of the fields of a template, or of a part of it."""
  return [name for name, _ in _FIELD.findall(template)]


def split_template(template: str) -> list[str]:
  """Returns the segments of a template, without the white space around them."""
  return [segment.strip() for segment in template.split(BREAK)]


def drop_empty_lines(task: InstructionTask, record: Record, segment: str) -> str:
  """Leaves out the lines of a text segment whose optional text is empty in a record.

    "Question: {question}\nContext: {context?}\nAnswer: {answer}." with the context "":
    "Question: {question}\nAnswer: {answer}."

  Raises:
    RecordError: another text of the segment is empty.
  """
  kept = []
  for line in segment.split("\n"):
    empty = [(name, mark) for name, mark in _FIELD.findall(line) if not record.texts[name].strip()]
    for name, mark in empty:
      if not mark:
        raise RecordError(
          "empty", f"record {record.key} has an empty {name}: task {task.name} needs one."
        )
    if not empty:
      kept.append(line)
  return "\n".join(kept)


def choose_template(task: InstructionTask, key: str) -> str:
  """Chooses the template of a record by its key: the same in every run."""
  digest = hashlib.sha256(f"{task.name} {key}".encode()).digest()
  return task.templates[int.from_bytes(digest[:8], "big") % len(task.templates)]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A record in the form of its task.

  Attributes:
    segments: of the document.
    start, stop: half-open range of the target in `</s> segment <break> ... segment </s>`.
  """

  segments: tuple[Segment, ...]
  start: int
  stop: int


def join_record(
  task: InstructionTask,
  record: Record,
  encode: Callable[[str], np.ndarray],
  codes: Mapping[str, np.ndarray],
) -> Instruction:
  """Joins a record by its task's template.

    "Question: {question} Answer: {answer}. <break> {image}", target "answer":
    segments "Question: how many? Answer: two." and the image, range of the tokens of "two"

  A target within a text is encoded apart from what is around it, as tasks that fill in a mask do
  (`encode_pieces`), so its tokens are those that the mask will be asked for. White space in texts
  of the record becomes single spaces; line breaks of the template stay.

  Args:
    task: with its templates.
    record: of the task's source.
    encode: text -> [T] int32 ids.
    codes: ids of the images by their fields, [I] int32 of the shared vocabulary.

  Raises:
    RecordError: an empty text, see `drop_empty_lines`: the record is set aside.
    UserError: a field that the record does not have, an image inside a text or predicted before
      the end, or drops without effect.
  """
  segments: list[Segment] = []
  at, found = 1, (0, 0)
  for text in split_template(choose_template(task, record.key)):
    tokens, is_image, inside = _segment(task, record, text, encode, codes)
    if not len(tokens):
      continue
    segments.append(Segment(is_image, tokens))
    if inside is not None:
      found = (at + inside[0], at + inside[1])
    at += len(tokens) + 1
  _check_place(task, segments, found, at - 1)
  return Instruction(tuple(segments), *found)


def _check_place(task: InstructionTask, segments: list[Segment], target, end: int) -> None:
  """Checks that an image that is predicted is last, and that what may be dropped can be.

  Args:
    task: of the record.
    segments: of the document.
    target: half-open range of the target.
    end: place after the last segment.

  Raises:
    UserError: naming the task.
  """
  is_last = segments[-1].is_image and target == (end - len(segments[-1].tokens), end)
  if not is_last:
    starts = np.cumsum([1, *(len(segment.tokens) + 1 for segment in segments)])
    place = int(np.searchsorted(starts, target[0], side="right")) - 1
    if segments[place].is_image:
      raise UserError(
        f"task {task.name} predicts the image {{{task.target}}}, which must be the last segment of "
        "a template."
      )
  if (task.drop_instruction or task.drop_all) and not is_last:
    raise UserError(
      f"task {task.name} predicts a text, and only images can lack what is before them: leave "
      "drop_instruction and drop_all out."
    )
  if task.drop_instruction and (len(segments) < 2 or segments[-2].is_image):
    raise UserError(
      f"task {task.name} has drop_instruction, and no text stands before {{{task.target}}}."
    )


def _segment(task: InstructionTask, record: Record, text: str, encode, codes):
  """Returns the tokens of a segment, whether it is an image, and the target's range or None."""
  fields = fields_of(text)
  images = [field for field in fields if field in record.images]
  if images:
    if text != f"{{{images[0]}}}":
      raise UserError(
        f"the template of task {task.name} has the image {{{images[0]}}} in a text: put {BREAK} "
        "between them."
      )
    tokens = np.asarray(codes[images[0]], np.int32)
    return tokens, True, (0, len(tokens)) if images[0] == task.target else None
  for field in fields:
    if field not in record.texts:
      known = ", ".join(sorted([*record.texts, *record.images]))
      raise UserError(
        f"a template of task {task.name} has the field {{{field}}}; its record {record.key} has "
        f"{known or 'none'}."
      )
  text = drop_empty_lines(task, record, text)
  if not text:
    return np.zeros(0, np.int32), False, None
  texts = {field: " ".join(record.texts[field].split()) for field in fields}
  if task.target not in fields:
    return encode(_FIELD.sub(lambda match: texts[match[1]], text)), False, None
  before, after = text.split(f"{{{task.target}}}")
  before, after = (_FIELD.sub(lambda match: texts[match[1]], part) for part in (before, after))
  pieces = encode_pieces(encode, [before, after])
  target = encode(texts[task.target])
  tokens = np.concatenate([pieces[0], target, pieces[1]]).astype(np.int32)
  return tokens, False, (len(pieces[0]), len(pieces[0]) + len(target))


def mixture(
  tasks: Sequence[InstructionTask], sizes: Sequence[int], least: float = 0.3, most: float = 3.0
) -> list[float]:
  """Computes the shares of tasks: proportional to their sizes, with clipped ratios.

    sizes = [100, 1000, 100000]: their mean is 33,700, the ratios 0.003, 0.03 and 2.97 become 0.3,
    0.3 and 2.97, the shares 0.084, 0.084 and 0.832

  CM3Leon, section 4: "threshold 3/0.3", read as the range of a task's size over the mean size.

  Args:
    tasks: with weights and caps.
    sizes: numbers of their records.
    least: smallest ratio.
    most: largest ratio.

  Raises:
    UserError: a task has no records, or no task has a weight.
  """
  for task, size in zip(tasks, sizes, strict=True):
    if not size:
      raise UserError(f"task {task.name} has no records: add some, or leave the task out.")
  counted = [min(size, task.cap or size) for task, size in zip(tasks, sizes)]
  mean = sum(counted) / len(counted)
  ratios = [task.weight * min(max(size / mean, least), most) for task, size in zip(tasks, counted)]
  if not sum(ratios):
    raise UserError("all tasks have the weight 0: give one of them a weight.")
  return [ratio / sum(ratios) for ratio in ratios]
