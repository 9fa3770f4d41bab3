"""What is asked of a world: what it draws, how it judges, and what reports say of it.

`worlds.MODULES` names the worlds. All else of the package asks them through `World`, so another
world is a folder of its own and a row of that table.
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
  """An answer to a record.

  Attributes:
    record: what was asked.
    prompt: as the model was asked.
    given: the given image, [H, W, 3] uint8, or None.
    answer: text, or image [H, W, 3] uint8.
    right: whether it is wholly right.
    reason: what is wrong; "" if nothing is.
    kept: of an edit or a completed image, whether all that had to stay did; None elsewhere.
    true: of an image, the right one, [H, W, 3] uint8; None for a text.
    score: mean log-probability of its tokens, in nats.
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


@dataclasses.dataclass(frozen=True)
class JudgedSamples:
  """Images for held-out captions, judged.

  Attributes:
    overview: their main shares, for the numbers of the stage and for `World.headlines`. "best" and
      "bundled" are shown by the report.
    text: all shares, to be printed.
  """

  overview: dict[str, Any]
  text: str


class World(Protocol):
  """A world: records to train on, a judge of what a model makes of them, and words for reports.

  Attributes:
    name: in `worlds.MODULES`; also of the files and numbers of its evaluation.
    caption: an example.
    bundled: name of the installed model that knows the world.
  """

  name: str
  caption: str
  bundled: str

  @property
  def kinds(self) -> Mapping[str, Sequence[str]]:
    """Kinds of tasks -> names of the tasks over whose grades a mean is taken."""

  @property
  def sheet_size(self) -> int:
    """Largest number of captions on the sheet of an evaluation."""

  @property
  def measures(self) -> Sequence[str]:
    """Columns of the tables of an evaluation, see `rows`."""

  def check_installed(self) -> None:
    """Raises UserError if the packages that draw the world are absent."""

  def source(self, settings: Settings) -> DrawnSource:
    """Returns the source of records."""

  def tasks(self, settings: Settings) -> DrawnTasks:
    """Returns the tasks of instruction tuning."""

  def judge_images(
    self, images: np.ndarray, facts: Sequence[dict], settings: Settings
  ) -> list[bool]:
    """Returns whether each image shows exactly what its caption says.

    Args:
      images: [n, H, W, 3] uint8.
      facts: field `facts` of n documents.
      settings: of the run.
    """

  def judge_answer_texts(self, records: Sequence[Record], texts: Sequence[str]) -> list[Answer]:
    """Judges a text as the answer to each record."""

  def judge_answer_images(
    self,
    records: Sequence[Record],
    images: Sequence[np.ndarray] | np.ndarray,
    settings: Settings,
  ) -> list[Answer]:
    """Judges an image, [H, W, 3] uint8, as the answer to each record."""

  def guesses(self, records: Sequence[Record]) -> dict[str, list[str]]:
    """Answers questions without a look at image or question: title -> an answer to each record.

    {} if the records, all of one task, are no questions.
    """

  def evaluate(
    self,
    pipeline: Pipeline,
    tasks: Sequence[HeldoutCaption],
    workdir: epath.PathLike,
    folder: epath.PathLike,
    bundled: Callable[[list[str]], list[np.ndarray]] | None = None,
  ) -> JudgedSamples:
    """Generates an image for each task and judges it; writes NAME.json and NAME.png, a sheet.

    Args:
      pipeline: of the run.
      tasks: result of `strata.heldout_captions`.
      workdir: of the run, whose training documents are read.
      folder: gets the files. NAME.json has "tables", see `rows`, by their titles: one for each
        guidance weight, and "reconstructions".
      bundled: generates an image for each caption of the sheet, with the bundled model.
    """

  def geneval_metadata(self, task: HeldoutCaption) -> dict[str, Any]:
    """Returns what GenEval checks of an image for a held-out caption."""

  def about(self, settings: Settings) -> dict[str, Any]:
    """Returns numbers of the world that a model of these settings was trained on."""

  def headlines(self, summary: dict[str, Any]) -> tuple[Headline, ...]:
    """Returns the headlines of a run whose samples or answers were judged; () if none were.

    Args:
      summary: result of `reports.summary.collect`.
    """

  def rows(self, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a table with their labels: "images", a number, and the `measures`."""


def find(name: str) -> World:
  """Returns the world of a name in `worlds.MODULES`."""
  world: World = importlib.import_module(worlds.MODULES[name]).WORLD
  return world


def of_source(settings: Settings) -> World | None:
  """Returns the world that a config takes its records from, or None."""
  return find(settings.raw.source) if settings.raw.source in worlds.MODULES else None


def of_facts(settings: Settings) -> World:
  """Returns the world that judges records with facts: that of the config's source, or the first.

  Records of other sources may have facts, too, in the form of the first world
  (docs/data_formats.md).
  """
  return of_source(settings) or find(next(iter(worlds.MODULES)))


def of_answers(task: InstructionTask) -> World | None:
  """Returns the world that judges answers to a task exactly: it draws them, and holds some out."""
  name = worlds.world_of_format(task.format)
  return find(name) if name and task.heldout else None


def drawn_tasks(settings: Settings) -> dict[str, DrawnTasks]:
  """Returns the tasks of all worlds by their names, as `data.instructions.sources` takes them."""
  return {name: find(name).tasks(settings) for name in worlds.MODULES}
