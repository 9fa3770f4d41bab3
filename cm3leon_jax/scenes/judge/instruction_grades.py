"""Grades answers to held-out instructions over `scenes`, and baselines without a model.

A model is asked in the words of its task's template: for the text that a mask stands for, or for
the image that follows.
"""

# n records, H height, W width.

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from cm3leon_jax.data.instructions import sources
from cm3leon_jax.data.instructions.config import InstructionTask, split_template
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.stores import square_pixels
from cm3leon_jax.data.instructions.tasks import choose_template
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.generation.image_tasks import Edit, Instruct, TextToImage
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import BREAK, IMAGE, MASK, Task
from cm3leon_jax.generation.text_tasks import InfillText
from cm3leon_jax.scenes.config import Style
from cm3leon_jax.scenes.instructions import EDITS, QUESTIONS
from cm3leon_jax.scenes.judge import answers as scene_answers
from cm3leon_jax.scenes.tasks import ScenesTasks
from cm3leon_jax.settings import Settings
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

LONGEST_TEXT = 40  # Tokens of an answer: captions of scenes are shorter.


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer to a record.

  Attributes:
    record: what was asked.
    prompt: as the model was asked.
    given: the given image, [H, W, 3] uint8, or None.
    answer: text, or image [H, W, 3] uint8.
    right: whether it is wholly right.
    reason: what is wrong; "" if nothing is.
    kept: of an edit or a completed image, whether all that had to stay did; None elsewhere.
    score: mean log-probability of its tokens, in nats.
  """

  record: Record
  prompt: str
  given: np.ndarray | None
  answer: str | np.ndarray
  right: bool
  reason: str = ""
  kept: bool | None = None
  score: float = 0.0


def is_judged(task: InstructionTask) -> bool:
  """Returns whether answers to a task are judged exactly: those over scenes, with held-out ones."""
  return task.format.startswith(sources.SCENES) and bool(task.heldout)


def true_image(record: Record) -> np.ndarray:
  """Returns the true answer to a record of an image task, [H, W, 3] uint8."""
  return np.asarray(record.images["after" if record.facts["task"] in EDITS else "image"])


def heldout_records(task: InstructionTask, settings: Settings, count: int) -> list[Record]:
  """Returns the first held-out records of a task that `is_judged`."""
  task = dataclasses.replace(task, heldout_records=count)
  drawn = ScenesTasks(settings.scenes)
  return list(sources.open_task(task, "heldout", settings.instructions, drawn))


def prompt_of(task: InstructionTask, record: Record, **common: Any) -> Task:
  """Returns what a model is asked for a record.

    "Question: {question} Answer: {answer}. <break> {image}", target "answer":
    InfillText("Question: Is there a cat? Answer: <mask>. <break> <image>", image)

  Args:
    task: of the record.
    record: its texts and images.
    **common: seed and sampling, and for captions `retrieve`.
  """
  retrieve = common.pop("retrieve", 0)
  segments: list[str] = []
  given: Any = ""
  for segment in split_template(choose_template(task, record.key)):
    if segment == f"{{{task.target}}}" and task.target in record.images:
      break
    for field, text in record.texts.items():
      segment = segment.replace(f"{{{field}}}", MASK if field == task.target else text)
    for field, image in record.images.items():
      if segment == f"{{{field}}}":
        segment, given = IMAGE, image
    segments.append(segment)
  prompt = f" {BREAK} ".join(segments)
  if task.target in record.texts:
    return InfillText(prompt=prompt, image=given, length=LONGEST_TEXT, **common)
  if IMAGE not in segments and len(segments) == 1:
    return TextToImage(prompt=prompt, retrieve=retrieve, **common)
  if task.drop_instruction:
    return Edit(prompt=segments[-1], image=given, **common)
  return Instruct(prompt=prompt, image=given, **common)


def answer_all(
  pipeline: Pipeline,
  task: InstructionTask,
  records: Sequence[Record],
  retrieve: int = 0,
) -> list[Answer]:
  """Generates and judges an answer to each record; the first has the seed of the settings."""
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
    found = judge_texts(records, texts)
  else:
    style = settings.scenes.style
    found = judge_images(records, [sample.segments[0] for sample in samples], style)
  return [
    dataclasses.replace(answer, prompt=prompt, given=image, score=score)
    for answer, prompt, image, score in zip(found, prompts, given, scores)
  ]


def judge_texts(records: Sequence[Record], texts: Sequence[str]) -> list[Answer]:
  """Judges texts as answers."""
  found = []
  for record, text in zip(records, texts, strict=True):
    right = scene_answers.is_right(record, text)
    reason = "" if right else f"right: {scene_answers.answer_of(record)}"
    found.append(Answer(record, "", None, text, right, reason))
  return found


def judge_images(
  records: Sequence[Record], images: Sequence[np.ndarray] | np.ndarray, style: Style = "filled"
) -> list[Answer]:
  """Judges images as answers."""
  verdicts = scene_answers.judge_images(records, np.stack([*images]), style)
  return [
    Answer(record, "", None, image, v.correct, v.reason, v.holds.get("kept"))
    for record, image, v in zip(records, images, verdicts)
  ]


def without_model(
  task: InstructionTask,
  records: Sequence[Record],
  image_tokenizer: ImageTokenizer,
  style: Style = "filled",
) -> dict[str, list[Answer]]:
  """Answers without a model: what any model has to beat, and what none can.

  Returns:
    For questions "majority", the most frequent answer, and "any object", an answer that knows what
    the image shows and does not look at what is asked (`answers.any_object_answer`); where
    there is none, the most frequent answer. For images "copy", the given image unchanged, if
    there is one, and "tokenizer", the true image as the image tokenizer reconstructs it.
  """
  if task.target in records[0].texts:
    name = records[0].facts["task"]
    if name not in QUESTIONS:
      return {}
    majority = scene_answers.majority_answers(records)[name]
    blind = [scene_answers.any_object_answer(record) or majority for record in records]
    return {
      "majority": judge_texts(records, [majority] * len(records)),
      "any object": judge_texts(records, blind),
    }
  side = image_tokenizer.config.resolution
  true = np.stack([square_pixels(record.images[task.target], side) for record in records])
  decoded = image_tokenizer.decode(image_tokenizer.encode(true))
  result = {"tokenizer": judge_images(records, decoded, style)}
  given = [field for field in records[0].images if field != task.target]
  if given:
    copies = [np.asarray(record.images[given[0]]) for record in records]
    result["copy"] = judge_images(records, copies, style)
  return result


def summarize(answers: Sequence[Answer], num_resamples: int, seed: int) -> dict:
  """Computes shares with 95% intervals over scenes.

  Returns:
    {"right": {share, low, high, groups, effective_groups}}, and of images with parts that had to
    stay "kept".
  """
  options = (answers, num_resamples, seed)
  result = {"answers": len(answers), "right": _share([a.right for a in answers], *options)}
  if answers[0].kept is not None:
    result["kept"] = _share([a.kept for a in answers], *options)
  return result


def _share(values: Sequence, answers: Sequence[Answer], num_resamples: int, seed: int) -> dict:
  """Averages a value of each answer: {share, low, high, groups, effective_groups}."""
  groups = [answer.record.group for answer in answers]
  found = intervals.mean_interval(values, np.ones(len(values)), groups, num_resamples, seed)
  return {"share": found.pop("mean"), **found}


def gain(after: Sequence[Answer], before: Sequence[Answer], num_resamples: int, seed: int) -> dict:
  """Computes how many more answers to the same records are right: {share, low, high, ...}."""
  values = [a.right - b.right for a, b in zip(after, before, strict=True)]
  return _share(values, after, num_resamples, seed)


def means(tables: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
  """Computes the means over questions and over edits.

  Args:
    tables: name of a task -> title ("before", "after", "majority", ...) -> result of `summarize`.

  Returns:
    {"questions": {title: mean of the shares that are right}, "edits": ...}, "edits, kept", of the
    titles that all tasks of the kind have.
  """
  result = {}
  for kind, members in (("questions", QUESTIONS), ("edits", tuple(EDITS))):
    some = [tables[name] for name in members if name in tables]
    if len(some) < len(members):
      continue
    titles = [title for title in some[0] if all(title in table for table in some)]
    result[kind] = {
      title: float(np.mean([table[title]["right"]["share"] for table in some])) for title in titles
    }
    if kind == "edits":
      result["edits, kept"] = {
        title: float(np.mean([table[title]["kept"]["share"] for table in some])) for title in titles
      }
  return result
