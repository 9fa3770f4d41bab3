"""Grades answers of a model or a baseline to held-out instructions, with a world's judge."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from cm3leon_jax.data.instructions import sources
from cm3leon_jax.data.instructions.config import InstructionTask
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.stores import square_pixels
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.world import Answer, World, drawn_tasks
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.record_prompts import prompt_of
from cm3leon_jax.settings import Settings
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer


def heldout_records(task: InstructionTask, settings: Settings, count: int) -> list[Record]:
  """Returns the first `count` held-out records of a task."""
  task = dataclasses.replace(task, heldout_records=count)
  drawn = drawn_tasks(settings)
  return list(sources.open_task(task, "heldout", settings.instructions, drawn))


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
  world: World,
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
    found = world.judge_answer_texts(records, texts)
  else:
    images = [sample.segments[0] for sample in samples]
    found = world.judge_answer_images(records, images, settings)
  return [
    dataclasses.replace(answer, prompt=prompt, given=image, score=score)
    for answer, prompt, image, score in zip(found, prompts, given, scores)
  ]


def without_model(
  world: World,
  task: InstructionTask,
  records: Sequence[Record],
  image_tokenizer: ImageTokenizer,
  settings: Settings,
) -> dict[str, list[Answer]]:
  """Judges answers that need no model: baselines that a model should beat, and an upper bound.

  Returns:
    Title -> judged answers. Tasks that answer questions have the `guesses` of the world. Tasks that
    answer with an image have "copy", the unchanged input image (if there is one), and "tokenizer",
    the true image as the image tokenizer reconstructs it. No model can beat "tokenizer".
  """
  if task.target in records[0].texts:
    guesses = world.guesses(records).items()
    return {title: world.judge_answer_texts(records, texts) for title, texts in guesses}
  side = image_tokenizer.config.resolution
  true = np.stack([square_pixels(record.images[task.target], side) for record in records])
  decoded = image_tokenizer.decode(image_tokenizer.encode(true))
  result = {"tokenizer": world.judge_answer_images(records, decoded, settings)}
  given = [field for field in records[0].images if field != task.target]
  if given:
    copies = [np.asarray(record.images[given[0]]) for record in records]
    result["copy"] = world.judge_answer_images(records, copies, settings)
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
  found = intervals.mean_interval(values, np.ones(len(values)), groups, num_resamples, seed)
  return {"share": found.pop("mean"), **found}


def gain(after: Sequence[Answer], before: Sequence[Answer], num_resamples: int, seed: int) -> dict:
  """Computes the share of correct answers in `after` minus the share in `before`.

  Both sequences must answer the same records. Returns {share, low, high, groups, effective_groups}.
  """
  values = [a.right - b.right for a, b in zip(after, before, strict=True)]
  return _share(values, after, num_resamples, seed)


def means(
  tables: dict[str, dict[str, dict]], kinds: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
  """Averages shares over the tasks of each kind. Kinds with a missing task are left out.

  Args:
    tables: name of a task -> title ("before", "after", "majority", ...) -> result of `summarize`.
    kinds: name of a kind, such as "edits" -> names of the tasks of this kind.

  Returns:
    {"edits": {title: mean share of correct answers}, "edits, kept": {title: mean share of "kept"}},
    for the titles that all tasks of the kind have. "edits, kept" is present only if all tasks of
    the kind have "kept".
  """
  result = {}
  for kind, members in kinds.items():
    some = [tables[name] for name in members if name in tables]
    if len(some) < len(members):
      continue
    titles = [title for title in some[0] if all(title in table for table in some)]
    for measure, label in (("right", kind), ("kept", f"{kind}, kept")):
      if all(measure in table[title] for table in some for title in titles):
        shares = {title: [table[title][measure]["share"] for table in some] for title in titles}
        result[label] = {title: float(np.mean(shares[title])) for title in titles}
  return result
