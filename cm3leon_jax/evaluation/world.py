"""Defines the interface of a world: its records, its judge, and its part of the reports.

`worlds.MODULES` lists the worlds. The rest of the package uses worlds only through `World`. To add
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


class World(Protocol):
  """Source of records that also judges generated samples and describes them in reports.

  Attributes:
    name: key in `worlds.MODULES`; also the name of the files and figures of its evaluation.
    caption: example caption for model cards.
    bundled: name of the bundle in this package that was trained on this world.
  """

  name: str
  caption: str
  bundled: str

  @property
  def kinds(self) -> Mapping[str, Sequence[str]]:
    """Maps each kind of task to the names of the tasks whose results are averaged."""

  @property
  def sheet_size(self) -> int:
    """Maximum number of captions on the sample sheet of an evaluation."""

  @property
  def measures(self) -> Sequence[str]:
    """Names of the columns of `rows`."""

  def check_installed(self) -> None:
    """Raises UserError if the packages that draw the world are not installed."""

  def source(self, settings: Settings) -> DrawnSource:
    """Returns the source of the world's records."""

  def tasks(self, settings: Settings) -> DrawnTasks:
    """Returns the instruction tasks that the world draws."""

  def judge_images(
    self, images: np.ndarray, facts: Sequence[dict], settings: Settings
  ) -> list[bool]:
    """Returns, for each image, whether it shows exactly what its caption says.

    `images` is uint8 [n, H, W, 3]. `facts` contains the field `facts` of each image's document.
    """

  def judge_answer_texts(self, records: Sequence[Record], texts: Sequence[str]) -> list[Answer]:
    """Judges one text per record as the answer to this record."""

  def judge_answer_images(
    self,
    records: Sequence[Record],
    images: Sequence[np.ndarray] | np.ndarray,
    settings: Settings,
  ) -> list[Answer]:
    """Judges one image per record, uint8 [H, W, 3], as the answer to this record."""

  def guesses(self, records: Sequence[Record]) -> dict[str, list[str]]:
    """Returns answers of baselines without a model: baseline name -> one answer per record.

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
    """Generates and judges an image per task. Writes NAME.json and a sample sheet, NAME.png.

    The field "tables" of NAME.json maps titles to tables (see `rows`). There is one table for each
    guidance weight, and the table "reconstructions". `tasks` is the result of
    `strata.heldout_captions`. The training documents in `workdir` are also read. If `bundled` is
    given, it generates further images for the captions of the sheet.

    Returns (overview, text). `overview` contains the main shares of correct images. The stage
    stores it for `headlines`; the report shows its entries "best" and "bundled". `text` contains
    all shares, formatted for printing.
    """

  def geneval_metadata(self, task: HeldoutCaption) -> dict[str, Any]:
    """Returns what GenEval must check in an image of a held-out caption, as its metadata."""

  def about(self, settings: Settings) -> dict[str, Any]:
    """Returns numbers that describe the world under these settings, e.g. the number of scenes."""

  def headlines(self, summary: dict[str, Any]) -> tuple[Headline, ...]:
    """Returns the headlines of a run; () if none of its samples or answers were judged.

    `summary` is the result of `reports.summary.collect`.
    """

  def rows(self, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns (label, values) for each row of a table: the count "images", and all `measures`."""


def find(name: str) -> World:
  """Returns the world with this name in `worlds.MODULES`."""
  world: World = importlib.import_module(worlds.MODULES[name]).WORLD
  return world


def of_source(settings: Settings) -> World | None:
  """Returns the world that `raw.source` names, or None if `raw.source` is not a world."""
  return find(settings.raw.source) if settings.raw.source in worlds.MODULES else None


def of_facts(settings: Settings) -> World:
  """Returns the world that judges records with facts.

  This is the world that `raw.source` names. If `raw.source` is not a world, it is the first world,
  whose format the facts must have (docs/evaluation.md).
  """
  return of_source(settings) or find(next(iter(worlds.MODULES)))


def of_answers(task: InstructionTask) -> World | None:
  """Returns the world that judges answers to a task, or None if no world judges them.

  A world judges a task if it draws the records of the task and the task has held-out records.
  """
  name = worlds.world_of_format(task.format)
  return find(name) if name and task.heldout else None


def drawn_tasks(settings: Settings) -> dict[str, DrawnTasks]:
  """Maps the name of each world to its instruction tasks, for `data.instructions.sources`."""
  return {name: find(name).tasks(settings) for name in worlds.MODULES}
