"""Judges answers to instructions about scenes, and computes baseline answers without a model."""

# n records, H height, W width.

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.evaluation.world import Answer
from cm3leon_jax.scenes.config import Style
from cm3leon_jax.scenes.instructions import EDITS, QUESTIONS
from cm3leon_jax.scenes.judge import answers as scene_answers


def true_image(record: Record) -> np.ndarray:
  """Returns the true answer to a record of an image task, [H, W, 3] uint8."""
  return np.asarray(record.images["after" if record.facts["task"] in EDITS else "image"])


def judge_texts(records: Sequence[Record], texts: Sequence[str]) -> list[Answer]:
  """Judges texts as answers to records of text tasks."""
  found = []
  for record, text in zip(records, texts, strict=True):
    right = scene_answers.is_right(record, text)
    reason = "" if right else f"right: {scene_answers.answer_of(record)}"
    found.append(Answer(record, "", None, text, right, reason))
  return found


def judge_images(
  records: Sequence[Record], images: Sequence[np.ndarray] | np.ndarray, style: Style = "filled"
) -> list[Answer]:
  """Judges images as answers to records of image tasks."""
  verdicts = scene_answers.judge_images(records, np.stack([*images]), style)
  return [
    Answer(record, "", None, image, v.correct, v.reason, v.holds.get("kept"), true_image(record))
    for record, image, v in zip(records, images, verdicts)
  ]


def guesses(records: Sequence[Record]) -> dict[str, list[str]]:
  """Computes baseline answers to questions of one task.

  Returns a dict with two lists of answers, or {} if the task is not a question:
  - "majority" has the most frequent true answer for every record.
  - "any object" has the results of `answers.any_object_answer`, which ignores the object that a
    question asks for. If a result is None or "", the most frequent true answer replaces it.
  """
  name = records[0].facts["task"]
  if name not in QUESTIONS:
    return {}
  majority = scene_answers.majority_answers(records)[name]
  blind = [scene_answers.any_object_answer(record) or majority for record in records]
  return {"majority": [majority] * len(records), "any object": blind}
