"""Implements `evaluation.world.World` for the world `scenes`.

Most commands need only records. Therefore `samples`, which imports the decoder, and `table`, which
imports statistics, are imported in methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath
import numpy as np

from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.evaluation.world import Answer, World
from cm3leon_jax.scenes import headlines, source
from cm3leon_jax.scenes.instructions import EDITS, QUESTIONS, ScenesTasks
from cm3leon_jax.scenes.judge import answers, judge
from cm3leon_jax.scenes.source import ScenesSource
from cm3leon_jax.settings import Settings

if TYPE_CHECKING:
  from cm3leon_jax.generation.heldout import HeldoutCaption
  from cm3leon_jax.generation.pipeline import Pipeline


class ScenesWorld:
  """World of the demo, with icons in plain colors at four places."""

  name = source.NAME
  caption = "a green bell to the left of a blue key"
  bundled = "scenes"
  check_installed = staticmethod(source.check_installed)
  headlines = staticmethod(headlines.headlines)

  @property
  def kinds(self) -> dict[str, tuple[str, ...]]:
    return {"questions": QUESTIONS, "edits": tuple(EDITS)}

  @property
  def sheet_size(self) -> int:
    from cm3leon_jax.scenes.judge import samples

    return samples.SHEET_SCENES

  @property
  def measures(self) -> tuple[str, ...]:
    from cm3leon_jax.scenes.judge import table

    return table.COLUMNS

  def source(self, settings: Settings) -> ScenesSource:
    return ScenesSource(settings.scenes)

  def tasks(self, settings: Settings) -> ScenesTasks:
    return ScenesTasks(settings.scenes)

  def judge_images(
    self, images: np.ndarray, facts: Sequence[dict], settings: Settings
  ) -> list[bool]:
    verdicts = judge.judge_all(images, facts, settings.scenes.style)
    return [bool(verdict.correct) for verdict in verdicts]

  def judge_answer_texts(self, records: Sequence[Record], texts: Sequence[str]) -> list[Answer]:
    found = []
    for record, text in zip(records, texts, strict=True):
      right = answers.is_right(record, text)
      reason = "" if right else f"correct: {answers.answer_of(record)}"
      found.append(Answer(record, "", None, text, right, reason))
    return found

  def judge_answer_images(
    self, records: Sequence[Record], images: Sequence[np.ndarray] | np.ndarray, settings: Settings
  ) -> list[Answer]:
    verdicts = answers.judge_images(records, np.stack([*images]), settings.scenes.style)
    found = []
    for record, image, v in zip(records, images, verdicts):
      true = np.asarray(record.images["after" if record.facts["task"] in EDITS else "image"])
      kept = v.holds.get("kept")
      found.append(Answer(record, "", None, image, v.correct, v.reason, kept, true))
    return found

  def guesses(self, records: Sequence[Record]) -> dict[str, list[str]]:
    task = records[0].facts["task"]
    if task not in QUESTIONS:
      return {}
    majority = answers.majority_answers(records)[task]
    blind = [answers.any_object_answer(record) or majority for record in records]
    return {"majority": [majority] * len(records), "any object": blind}

  def evaluate(
    self,
    pipeline: Pipeline,
    tasks: Sequence[HeldoutCaption],
    workdir: epath.PathLike,
    folder: epath.PathLike,
    bundled: Callable[[list[str]], list[np.ndarray]] | None = None,
  ) -> tuple[dict[str, Any], str]:
    from cm3leon_jax.scenes.judge import samples

    result = samples.evaluate(pipeline, tasks, workdir, folder, bundled)
    return samples.overview(result), samples.describe(result)

  def geneval_metadata(self, task: HeldoutCaption) -> dict[str, Any]:
    from cm3leon_jax.scenes.judge import table

    return table.geneval_metadata(task.prompt, task.document.facts)

  def about(self, settings: Settings) -> dict[str, Any]:
    return {"training_scenes": settings.scenes.train}

  def rows(self, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    from cm3leon_jax.scenes.judge import table as tables

    return tables.rows(table)


WORLD: World = ScenesWorld()
