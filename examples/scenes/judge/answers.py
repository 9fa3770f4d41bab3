"""Judges answers to instructions about scenes: texts by their content, images by their facts."""

# B records, H height, W width.

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.sources.splits import fraction
from cm3leon_jax.evaluation.metrics import answers
from examples.scenes.instructions import EDITS, TEXT_TASKS
from examples.scenes.judge import clauses as caption_clauses
from examples.scenes.judge import judge
from examples.scenes.judge.facts import Found, SceneVerdict, check
from examples.scenes.questions import NUMBER_WORDS


def answer_of(record: Record) -> str:
  """Returns the true answer of a record of a text task."""
  return record.texts["caption" if record.facts["task"] == "describe" else "answer"]


def is_right(record: Record, answer: str) -> bool:
  """Returns whether an answer to a record of a text task is correct.

    "How many stars are there?": "two", "Two." and "2" are correct
    "Is there a cat?": only the first word counts, so "Yes, there is." is the same as "yes"

  `answers.normalize` normalizes answers before the comparison. A generated caption may differ from
  the caption of the record. It is correct if the image shows every object, color, place and
  relation that the caption names, and exactly as many objects as the caption names.
  """
  if record.facts["task"] == "describe":
    clauses = caption_clauses.parse(answer)
    return clauses is not None and check(shown_objects(record), clauses).correct
  if record.facts["task"] == "exists":
    answer = next(iter(answer.replace(",", " ").split()), "")
  return bool(answers.exact_matches([answer], [[answer_of(record)]])[0])


def shown_objects(record: Record) -> list[Found]:
  """Returns the objects that the image of a record really shows."""
  return [
    Found(x["class"], x["color"], x["place"], 1.0, tuple(x["box"])) for x in record.facts["objects"]
  ]


def mistakes(image: np.ndarray, facts: dict) -> str:
  """Judges an image, uint8 [H, W, 3]: says what is wrong, or "". Judge of the demo's configs.

  `facts` are those of a document, or of a record of an image task.
  """
  [result] = judge.find_objects(np.asarray(image)[None])
  return judge_objects(facts, result).reason


def judge_images(records: Sequence[Record], images: np.ndarray) -> list[SceneVerdict]:
  """Judges images, [B, H, W, 3] uint8, as answers to records of image tasks; see `judge_objects`.

  Sizes other than 48 x 48 are scaled.
  """
  result = judge.find_objects(images)
  return [judge_objects(record.facts, objects) for record, objects in zip(records, result)]


def judge_objects(facts: Mapping, found: Sequence[Found]) -> SceneVerdict:
  """Judges the objects that were found in an image by the facts of its caption or record.

  For records, `holds` has two more kinds of facts, and a correct image satisfies both:
  - `kept`. For edits, all facts hold that the instruction does not touch. For `complete`, all facts
    hold that the given half shows.
  - `instruction`, only for edits. The objects that the instruction names are as it requires.
  """
  verdict = check(found, facts["include"])
  if "kept" not in facts:
    return verdict
  holds = {**verdict.holds, "kept": _show(found, facts["kept"])}
  if facts["task"] in EDITS:
    touched = [thing for thing in found if thing.name in facts["touched"]]
    holds["instruction"] = check(touched, facts["changed"]).correct
  reasons = [verdict.reason] if verdict.reason else []
  if not holds["kept"]:
    reasons.append("a fact that had to stay does not hold")
  return dataclasses.replace(verdict, correct=not reasons, reason="\n".join(reasons), holds=holds)


def _show(found: Sequence[Found], facts: Sequence[dict]) -> bool:
  """Returns whether objects show all facts. A fact has some of `class`, `color` and `place`."""
  things = [{"class": thing.name, "color": thing.color, "place": thing.place} for thing in found]
  for fields in {tuple(sorted(fact)) for fact in facts}:
    wanted = Counter(_values(fact, fields) for fact in facts if tuple(sorted(fact)) == fields)
    if not wanted <= Counter(_values(thing, fields) for thing in things):
      return False
  return True


def _values(fact: dict, fields: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(fact[field] for field in fields)


def majority_answers(records: Sequence[Record]) -> dict[str, str]:
  """Returns the most frequent true answer of each text task. Ties are broken alphabetically.

  The frequency of this answer is the accuracy of a model that ignores both image and question.
  """
  counts: dict[str, Counter[str]] = {}
  for record in records:
    if record.facts["task"] in TEXT_TASKS:
      counts.setdefault(record.facts["task"], Counter())[answer_of(record)] += 1
  return {task: min(of, key=lambda answer: (-of[answer], answer)) for task, of in counts.items()}


def any_object_answer(record: Record) -> str | None:
  """Answers a question from the objects of the image, ignoring which object the question is about.

  For `color`, the answer is the color of an arbitrary object. For `relation`, it is an arbitrary
  object that the question does not name. The key of the record selects the object. For `count`, the
  answer is the number of all objects. Returns None for other tasks.
  """
  task, objects = record.facts["task"], record.facts["objects"]
  if task == "count":
    return NUMBER_WORDS[len(objects)]
  if task == "color":
    result = [thing["color"] for thing in objects]
  elif task == "relation":
    question = f" {record.texts['question'].rstrip('?')} "
    result = [thing["class"] for thing in objects if f" {thing['class']} " not in question]
  else:
    return None
  return min(result, key=lambda answer: fraction(f"{record.key}/{answer}"), default="")
