"""Defines the interface of a world: its records, its judge, and its part of the reports.

`worlds.MODULES` names the worlds. The rest of the package uses worlds only through `World`. To add
a world, add a folder with its code, and a row to `worlds.MODULES`.
"""

# n images or records, H height, W width.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, Protocol

from etils import epath
import numpy as np

from cm3leon_jax import worlds

if TYPE_CHECKING:
  from cm3leon_jax.data.instructions.config import InstructionTask
  from cm3leon_jax.data.instructions.records import DrawnTasks, Record
  from cm3leon_jax.data.sources.drawn import DrawnSource
  from cm3leon_jax.evaluation.headlines import Headline
  from cm3leon_jax.generation.heldout import HeldoutCaption
  from cm3leon_jax.generation.pipeline import Pipeline
  from cm3leon_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Answer:
  """Answer to an instruction record, with the verdict of the judge.

  Attributes:
    prompt: text that the model received.
    given: image that the model received, [H, W, 3] uint8, or None.
    answer: text, or image [H, W, 3] uint8.
    right: whether the whole answer is right.
    reason: what is wrong; "" if the answer is right.
    kept: for an edited or completed image, whether everything is unchanged that had to stay. None
      for other answers.
    true: for an image, the right image, [H, W, 3] uint8. None for a text.
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


class World(Protocol):
  """Source of records that also judges generated samples and describes them in reports.

  Attributes:
    name: key in `worlds.MODULES`. Files and figures of the evaluation also have this name.
    caption: example of a caption, for model cards.
    bundled: name of the model in the package that was trained on this world.
  """

  name: str
  caption: str
  bundled: str

  @property
  def kinds(self) -> Mapping[str, Sequence[str]]:
    """Maps each kind of task to the names of the tasks whose grades are averaged."""

  @property
  def sheet_size(self) -> int:
    """Largest number of captions on the sample sheet of an evaluation."""

  @property
  def measures(self) -> Sequence[str]:
    """Columns of the tables of an evaluation, see `rows`."""

  def check_installed(self) -> None:
    """Raises UserError if the packages that draw the world are not installed."""

  def source(self, settings: Settings) -> DrawnSource:
    """Returns the source of records."""

  def tasks(self, settings: Settings) -> DrawnTasks:
    """Returns the instruction tasks that the world draws."""

  def judge_images(
    self, images: np.ndarray, facts: Sequence[dict], settings: Settings
  ) -> list[bool]:
    """Returns whether each image shows exactly what its caption says.

    `images` are [n, H, W, 3] uint8. `facts` are the fields `facts` of n documents.
    """

  def judge_answer_texts(self, records: Sequence[Record], texts: Sequence[str]) -> list[Answer]:
    """Judges texts as answers to records. There is one text per record."""

  def judge_answer_images(
    self,
    records: Sequence[Record],
    images: Sequence[np.ndarray] | np.ndarray,
    settings: Settings,
  ) -> list[Answer]:
    """Judges images, [H, W, 3] uint8 each, as answers to records. There is one image per record."""

  def guesses(self, records: Sequence[Record]) -> dict[str, list[str]]:
    """Guesses answers without a model: title -> one answer per record.

    All records belong to one task. Returns {} if the records are not questions.
    """

  def evaluate(
    self,
    pipeline: Pipeline,
    tasks: Sequence[HeldoutCaption],
    workdir: epath.PathLike,
    folder: epath.PathLike,
    bundled: Callable[[list[str]], list[np.ndarray]] | None = None,
  ) -> tuple[dict[str, Any], str]:
    """Generates and judges an image for each task. Writes NAME.json and the sample sheet NAME.png.

    The field "tables" of NAME.json maps titles to tables (see `rows`). There is one table for each
    guidance weight, and the table "reconstructions". `tasks` is the result of
    `strata.heldout_captions`. The training documents in `workdir` are also read. `bundled`
    generates images for the captions of the sheet with the bundled model.

    Returns (overview, text). `overview` has the main shares of right images. The stage records it,
    and `headlines` reads it. The report shows its entries "best" and "bundled". `text` has all
    shares, formatted for printing.
    """

  def geneval_metadata(self, task: HeldoutCaption) -> dict[str, Any]:
    """Returns the metadata of a held-out caption, from which GenEval knows what to check."""

  def about(self, settings: Settings) -> dict[str, Any]:
    """Returns numbers that describe the world under these settings, e.g. the number of scenes."""

  def headlines(self, summary: dict[str, Any]) -> tuple[Headline, ...]:
    """Returns the headlines of a run, or () if none of its samples or answers were judged.

    `summary` is the result of `reports.summary.collect`.
    """

  def rows(self, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns (label, row) for each row of a table. A row has the count "images" and `measures`."""


def find(name: str) -> World:
  """Returns the world that has this name in `worlds.MODULES`."""
  world: World = importlib.import_module(worlds.MODULES[name]).WORLD
  return world


def of_source(settings: Settings) -> World | None:
  """Returns the world that `raw.source` names, or None if `raw.source` is another source."""
  return find(settings.raw.source) if settings.raw.source in worlds.MODULES else None


def of_facts(settings: Settings) -> World:
  """Returns the world that judges records with facts.

  This is the world that `raw.source` names. For other sources, it is the first world, because the
  facts of their records use the format of the first world (docs/scenes.md).
  """
  return of_source(settings) or find(next(iter(worlds.MODULES)))


def of_answers(task: InstructionTask) -> World | None:
  """Returns the world that judges answers to a task, or None if no world judges them.

  A world judges a task if it draws the records of the task and the task has held-out records.
  """
  name = worlds.world_of_format(task.format)
  return find(name) if name and task.heldout else None


def drawn_tasks(settings: Settings) -> dict[str, DrawnTasks]:
  """Maps the name of each world to its tasks, for `data.instructions.sources`."""
  return {name: find(name).tasks(settings) for name in worlds.MODULES}
