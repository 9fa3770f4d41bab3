"""Joins records into documents by the templates of a task, and mixes tasks.

A task has templates with named fields. The model predicts one of the fields, the target. If the
target is an image at the end of the document, it stays there. Any other target, such as an answer
before the image, is the CM3 span of the document, as in the paper (CM3Leon, section 4, table 5).
"""

# I codes per image, T tokens of a document.

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib

import numpy as np

from cm3leon_jax.config.instructions import (
  BREAK,
  FIELD,
  InstructionTask,
  fields_of,
  is_edit,
  split_template,
)
from cm3leon_jax.data.documents.store import Segment
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.sources.records import RecordError
from cm3leon_jax.errors import UserError
from cm3leon_jax.tokenizers.text import encode_pieces


def drop_empty_lines(task: InstructionTask, record: Record, segment: str) -> str:
  """Drops the lines of a text segment whose optional field is empty in the record.

    "Question: {question}\nContext: {context?}\nAnswer: {answer}." with the context "":
    "Question: {question}\nAnswer: {answer}."

  Raises:
    RecordError: a required field of the segment is empty.
  """
  kept = []
  for line in segment.split("\n"):
    empty = [(name, mark) for name, mark in FIELD.findall(line) if not record.texts[name].strip()]
    for name, mark in empty:
      if not mark:
        raise RecordError(
          f"record {record.key} has an empty {name}, which task {task.name} requires."
        )
    if not empty:
      kept.append(line)
  return "\n".join(kept)


def choose_template(task: InstructionTask, key: str) -> str:
  """Chooses the template of a record by its key, so every run makes the same choice."""
  digest = hashlib.sha256(f"{task.name} {key}".encode()).digest()
  return task.templates[int.from_bytes(digest[:8], "big") % len(task.templates)]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A document that a template made from a record.

  The half-open range of the target in `</s> segment <break> ... segment </s>` is `start` to `stop`.
  """

  segments: tuple[Segment, ...]
  start: int
  stop: int


def join_record(
  task: InstructionTask,
  record: Record,
  encode: Callable[[str], np.ndarray],
  codes: Mapping[str, np.ndarray],
  instruction_first: bool = False,
) -> Instruction:
  """Joins the fields of a record into a document, by a template of its task.

    "Question: {question} Answer: {answer}. <break> {image}", target "answer":
    the result has the segments "Question: how many? Answer: two." and the image, and the range of
    the tokens of "two"

  A target inside a text is encoded separately from the text around it (`encode_pieces`). When a
  mask is infilled in decoding, the text is encoded in the same way, so the tokens match. In texts
  of the record, white space is replaced by single spaces. Line breaks of the template are kept.

  Args:
    encode: text -> [T] int32 ids.
    codes: field name -> ids of the image in the shared vocabulary, [I] int32.
    instruction_first: whether the instruction of an edit comes before the input image, see
      `InstructionsConfig`.

  Raises:
    RecordError: a required text is empty, so the record is rejected.
    UserError: the template does not fit: the record lacks a field, an image is inside a text, a
      target image is not the last segment, or the task drops segments that cannot be dropped.
  """
  segments: list[Segment] = []
  at, found = 1, (0, 0)
  template = choose_template(task, record.key)
  for text in split_template(template):
    tokens, is_image, inside = _segment(task, record, text, encode, codes)
    if not len(tokens):
      continue
    segments.append(Segment(is_image, tokens))
    if inside is not None:
      found = (at + inside[0], at + inside[1])
    at += len(tokens) + 1
  is_last = _check_place(task, segments, found, at - 1)
  if is_last and is_edit(template):  # The texts and images between EDIT and the target.
    segments[1:-1] = sorted(segments[1:-1], key=lambda part: part.is_image == instruction_first)
  return Instruction(tuple(segments), *found)


def _check_place(
  task: InstructionTask, segments: list[Segment], target: tuple[int, int], end: int
) -> bool:
  """Checks that a target image is the last segment and that dropping segments is possible.

  `target` is a half-open range, and `end` is the index after the last token of the last segment.
  Returns whether the target is such an image.
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
      f"task {task.name} predicts a text, but segments can be dropped only before an image: remove "
      "drop_instruction and drop_all."
    )
  if task.drop_instruction and all(segment.is_image for segment in segments):
    raise UserError(
      f"task {task.name} has drop_instruction, but no text precedes {{{task.target}}}."
    )
  return is_last


def _segment(
  task: InstructionTask,
  record: Record,
  text: str,
  encode: Callable[[str], np.ndarray],
  codes: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, bool, tuple[int, int] | None]:
  """Returns the tokens of a segment, whether it is an image, and the range of the target.

  The range is None if the target is not in this segment.
  """
  fields = fields_of(text)
  images = [field for field in fields if field in record.images]
  if images:
    if text != f"{{{images[0]}}}":
      raise UserError(
        f"the template of task {task.name} has the image {{{images[0]}}} inside a text: put "
        f"{BREAK} between them."
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
    return encode(FIELD.sub(lambda match: texts[match[1]], text)), False, None
  before, after = text.split(f"{{{task.target}}}")
  before, after = (FIELD.sub(lambda match: texts[match[1]], part) for part in (before, after))
  pieces = encode_pieces(encode, [before, after])
  target = encode(texts[task.target])
  tokens = np.concatenate([pieces[0], target, pieces[1]]).astype(np.int32)
  return tokens, False, (len(pieces[0]), len(pieces[0]) + len(target))


def mixture(
  tasks: Sequence[InstructionTask], sizes: Sequence[int], least: float = 0.3, most: float = 3.0
) -> list[float]:
  """Computes the shares of tasks from their sizes, which are first clipped relative to the mean.

    sizes = [100, 1000, 100000]: the mean is 33,700. The ratios to the mean are 0.003, 0.03 and
    2.97. They are clipped to 0.3, 0.3 and 2.97, so the shares are 0.084, 0.084 and 0.832.

  CM3Leon, section 4, says "threshold 3/0.3". Here, the ratio of each size to the mean size is
  clipped to the range from `least` to `most`.

  Raises:
    UserError: a task has no records, or all weights are 0.
  """
  for task, size in zip(tasks, sizes, strict=True):
    if not size:
      raise UserError(f"task {task.name} has no records: add some, or remove the task.")
  counted = [min(size, task.cap or size) for task, size in zip(tasks, sizes)]
  mean = sum(counted) / len(counted)
  ratios = [task.weight * min(max(size / mean, least), most) for task, size in zip(tasks, counted)]
  if not sum(ratios):
    raise UserError("all tasks have weight 0: give at least one task a positive weight.")
  return [ratio / sum(ratios) for ratio in ratios]
