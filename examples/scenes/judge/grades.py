"""Grades answers of a model or a baseline to held-out instructions about scenes."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from cm3leon_jax.config.instructions import InstructionTask
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.instructions import sources
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.stores import square_pixels
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.record_prompts import prompt_of
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from examples.scenes.instructions import EDITS, QUESTIONS
from examples.scenes.judge import answers as judging

# Kind of task -> names of the tasks whose results are averaged.
KINDS = {"questions": QUESTIONS, "edits": tuple(EDITS)}


@dataclasses.dataclass(frozen=True)
class Answer:
  """Answer of a model to an instruction record, with the verdict of the judge.

  Attributes:
    prompt: text that the model received.
    given: input image of the model, uint8 [H, W, 3], or None.
    answer: text, or image, uint8 [H, W, 3].
    right: whether the whole answer is correct.
    reason: what is wrong; "" if the answer is correct.
    kept: for an edited or completed image, whether the rest of the image is unchanged. None for
      other answers.
    true: the correct image, uint8 [H, W, 3], if the answer is an image; None for a text.
    score: mean log-probability of the tokens of the answer, in nats.
  """

  record: Record
  prompt: str
  given: np.ndarray | None
  answer: str | np.ndarray
  right: bool
  reason: str = ""
  kept: bool | None = None
  true: np.ndarray | None = None
  score: float = 0.0


def judge_texts(records: Sequence[Record], texts: Sequence[str]) -> list[Answer]:
  """Judges one text per record as the answer to this record."""
  result = []
  for record, text in zip(records, texts, strict=True):
    right = judging.is_right(record, text)
    reason = "" if right else f"correct: {judging.answer_of(record)}"
    result.append(Answer(record, "", None, text, right, reason))
  return result


def judge_images(
  records: Sequence[Record], images: Sequence[np.ndarray] | np.ndarray
) -> list[Answer]:
  """Judges one image per record, uint8 [H, W, 3], as the answer to this record."""
  verdicts = judging.judge_images(records, np.stack([*images]))
  result = []
  for record, image, v in zip(records, images, verdicts):
    true = np.asarray(record.images["after" if record.facts["task"] in EDITS else "image"])
    result.append(Answer(record, "", None, image, v.correct, v.reason, v.holds.get("kept"), true))
  return result


def guesses(records: Sequence[Record]) -> dict[str, list[str]]:
  """Returns answers of baselines without a model: baseline name -> one answer per record.

  All records belong to one task. Returns {} if the records are not questions.
  """
  task = records[0].facts["task"]
  if task not in QUESTIONS:
    return {}
  majority = judging.majority_answers(records)[task]
  blind = [judging.any_object_answer(record) or majority for record in records]
  return {"majority": [majority] * len(records), "any object": blind}


def heldout_records(task: InstructionTask, settings: Settings, count: int) -> list[Record]:
  """Returns the first `count` held-out records of a task, with the pixels of their images."""
  task = dataclasses.replace(task, heldout_records=count)
  return [
    dataclasses.replace(one, images={name: _pixels(file) for name, file in one.images.items()})
    for one in sources.open_task(task, "heldout", settings.instructions)
  ]


def _pixels(file: Any) -> np.ndarray:
  with Image.open(file) as image:
    return np.asarray(image.convert("RGB"))


def redrawn(
  task: InstructionTask, records: Sequence[Record], image_tokenizer: ImageTokenizer
) -> list[Record]:
  """Returns the records with input images as the image tokenizer reconstructs them.

  These images are [H, W, 3] uint8, with the sides of the tokenizer. Returns [] if the task has no
  input images. `records` must not be empty.
  """
  fields = [field for field in records[0].images if field != task.target]
  side, images = image_tokenizer.config.resolution, {}
  for field in fields:
    pixels = np.stack([square_pixels(record.images[field], side) for record in records])
    images[field] = image_tokenizer.decode(image_tokenizer.encode(pixels))
  return [
    dataclasses.replace(record, images={**record.images, **{f: images[f][i] for f in fields}})
    for i, record in enumerate(records if fields else ())
  ]


def answer_all(
  pipeline: Pipeline,
  task: InstructionTask,
  records: Sequence[Record],
  retrieve: int = 0,
) -> list[Answer]:
  """Generates and judges one answer per record. Record i uses `pipeline.settings.seed` + i."""
  settings = pipeline.settings
  asked = [
    prompt_of(
      task, record, seed=settings.seed + i, sampling=settings.sampling, retrieve=retrieve, row=i
    )
    for i, record in enumerate(records)
  ]
  samples = [some[0] for some in pipeline.generate(asked)]
  scores = [
    float(np.mean(sample.log_probs)) if len(sample.log_probs) else 0.0 for sample in samples
  ]
  given: list[Any] = [None if isinstance(one.image, str) else one.image for one in asked]
  prompts = [one.prompt for one in asked]
  if task.target in records[0].texts:
    texts = [sample.filled[0] if sample.filled else "" for sample in samples]
    result = judge_texts(records, texts)
  else:
    images = [sample.segments[0] for sample in samples]
    result = judge_images(records, images)
  return [
    dataclasses.replace(answer, prompt=prompt, given=image, score=score)
    for answer, prompt, image, score in zip(result, prompts, given, scores)
  ]


def without_model(
  task: InstructionTask, records: Sequence[Record], image_tokenizer: ImageTokenizer
) -> dict[str, list[Answer]]:
  """Judges answers that need no model: baselines that a model should beat, and an upper bound.

  Returns:
    Title -> judged answers. Tasks that answer questions have `guesses`. Tasks that
    answer with an image have "copy", the unchanged input image (if there is one), and "tokenizer",
    the true image as the image tokenizer reconstructs it. No model can beat "tokenizer".
  """
  if task.target in records[0].texts:
    return {title: judge_texts(records, texts) for title, texts in guesses(records).items()}
  side = image_tokenizer.config.resolution
  true = np.stack([square_pixels(record.images[task.target], side) for record in records])
  decoded = image_tokenizer.decode(image_tokenizer.encode(true))
  result = {"tokenizer": judge_images(records, decoded)}
  given = [field for field in records[0].images if field != task.target]
  if given:
    copies = [np.asarray(record.images[given[0]]) for record in records]
    result["copy"] = judge_images(records, copies)
  return result


def summarize(answers: Sequence[Answer], num_resamples: int, seed: int) -> dict:
  """Computes the share of correct answers, with a 95% confidence interval over groups of records.

  Returns {"answers": count, "right": {share, low, high, groups, effective_groups}}. If the answers
  are images in which parts had to stay unchanged, "kept" is added, with the same fields as "right".
  """
  options = (answers, num_resamples, seed)
  result = {"answers": len(answers), "right": _share([a.right for a in answers], *options)}
  if answers[0].kept is not None:
    result["kept"] = _share([a.kept for a in answers], *options)
  return result


def _share(values: Sequence, answers: Sequence[Answer], num_resamples: int, seed: int) -> dict:
  """Averages one value per answer. Returns {share, low, high, groups, effective_groups}."""
  groups = [answer.record.group for answer in answers]
  result = intervals.mean_interval(values, np.ones(len(values)), groups, num_resamples, seed)
  return {"share": result.pop("mean"), **result}


def gain(after: Sequence[Answer], before: Sequence[Answer], num_resamples: int, seed: int) -> dict:
  """Computes the share of correct answers in `after` minus the share in `before`.

  Both sequences must answer the same records. Returns {share, low, high, groups, effective_groups}.
  """
  values = [a.right - b.right for a, b in zip(after, before, strict=True)]
  return _share(values, after, num_resamples, seed)


def means(tables: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
  """Averages shares over the tasks of each of KINDS. Kinds with a missing task are left out.

  Args:
    tables: name of a task -> title ("before", "after", "majority", ...) -> result of `summarize`.

  Returns:
    {"edits": {title: mean share of correct answers}, "edits, kept": {title: mean share of "kept"}},
    for the titles that all tasks of the kind have. "edits, kept" is present only if all tasks of
    the kind have "kept".
  """
  result = {}
  for kind, members in KINDS.items():
    some = [tables[name] for name in members if name in tables]
    if len(some) < len(members):
      continue
    titles = [title for title in some[0] if all(title in table for table in some)]
    for measure, label in (("right", kind), ("kept", f"{kind}, kept")):
      if all(measure in table[title] for table in some for title in titles):
        shares = {title: [table[title][measure]["share"] for table in some] for title in titles}
        result[label] = {title: float(np.mean(shares[title])) for title in titles}
  return result
