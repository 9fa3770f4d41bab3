"""Implements `evaluation.world.World` for the world `scenes`.

Most commands need only records. Therefore modules for images and models are imported in methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath
import numpy as np

from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.evaluation.headlines import Headline
from cm3leon_jax.evaluation.world import Answer, World
from cm3leon_jax.scenes import headlines, instructions, source
from cm3leon_jax.scenes.source import ScenesSource
from cm3leon_jax.scenes.tasks import ScenesTasks
from cm3leon_jax.settings import Settings

if TYPE_CHECKING:
  from cm3leon_jax.generation.heldout import HeldoutCaption
  from cm3leon_jax.generation.pipeline import Pipeline


class ScenesWorld:
  """World of the demo, with icons in plain colors at four places."""

  name = source.NAME
  caption = "a green bell to the left of a blue key"
  bundled = "scenes"

  @property
  def kinds(self) -> dict[str, tuple[str, ...]]:
    return {"questions": instructions.QUESTIONS, "edits": tuple(instructions.EDITS)}

  @property
  def sheet_size(self) -> int:
    from cm3leon_jax.scenes.judge import samples

    return samples.SHEET_SCENES

  @property
  def measures(self) -> tuple[str, ...]:
    from cm3leon_jax.scenes.judge import table

    return table.COLUMNS

  def check_installed(self) -> None:
    source.check_installed()

  def source(self, settings: Settings) -> ScenesSource:
    return ScenesSource(settings.scenes)

  def tasks(self, settings: Settings) -> ScenesTasks:
    return ScenesTasks(settings.scenes)

  def judge_images(
    self, images: np.ndarray, facts: Sequence[dict], settings: Settings
  ) -> list[bool]:
    from cm3leon_jax.scenes.judge import judge

    verdicts = judge.judge_all(images, facts, settings.scenes.style)
    return [bool(verdict.correct) for verdict in verdicts]

  def judge_answer_texts(self, records: Sequence[Record], texts: Sequence[str]) -> list[Answer]:
    from cm3leon_jax.scenes.judge import instruction_grades

    return instruction_grades.judge_texts(records, texts)

  def judge_answer_images(
    self,
    records: Sequence[Record],
    images: Sequence[np.ndarray] | np.ndarray,
    settings: Settings,
  ) -> list[Answer]:
    from cm3leon_jax.scenes.judge import instruction_grades

    return instruction_grades.judge_images(records, images, settings.scenes.style)

  def guesses(self, records: Sequence[Record]) -> dict[str, list[str]]:
    from cm3leon_jax.scenes.judge import instruction_grades

    return instruction_grades.guesses(records)

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
    from cm3leon_jax.scenes.judge import samples

    return samples.metadata(task)

  def about(self, settings: Settings) -> dict[str, Any]:
    return {"training_scenes": settings.scenes.train}

  def headlines(self, summary: dict[str, Any]) -> tuple[Headline, ...]:
    return headlines.headlines(summary)

  def rows(self, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    from cm3leon_jax.scenes.judge import table as tables

    return tables.rows(table)


WORLD: World = ScenesWorld()
