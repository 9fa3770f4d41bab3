"""Skips rows of a run: the flags --resume_from and --skip_rows of `cm3leon train`."""

from collections.abc import Sequence
import dataclasses
import re

from etils import epath
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.checkpoints import recovery
from cm3leon_jax.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.config import UserError
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.training.watch.metrics import MetricsLog

RECORD = "left_out_rows.json"


@dataclasses.dataclass(frozen=True)
class GoBack:
  """Return to the checkpoint of `step`, from which the run continues without `rows`."""

  step: int
  rows: range

  @property
  def as_json(self) -> dict:
    """Entry that `go_back` adds to the record of skipped rows."""
    return {"resume_from": self.step, "first": self.rows[0], "last": self.rows[-1]}


def parse(resume_from: int | None, skip_rows: str) -> GoBack | None:
  """Parses --resume_from and --skip_rows. Returns None if neither is given.

    parse(500, "4000:4799"): GoBack(500, range(4000, 4800))

  Raises:
    UserError: only one of the flags is given, or `skip_rows` is not a pair FIRST:LAST.
  """
  if resume_from is None and not skip_rows:
    return None
  if resume_from is None or not skip_rows:
    raise UserError(
      "--resume_from and --skip_rows go together: give both, e.g. --resume_from=500 "
      "--skip_rows=4000:4799, or neither to continue from the newest checkpoint."
    )
  match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", skip_rows)
  if not match or int(match[1]) > int(match[2]):
    raise UserError(
      f"--skip_rows is '{skip_rows}'; it must be FIRST:LAST, the numbers of the first and the last "
      "row to leave out, e.g. 4000:4799."
    )
  return GoBack(resume_from, range(int(match[1]), int(match[2]) + 1))


def row_number(i: int, skipped: Sequence[range]) -> int:
  """Returns the index of the i-th row, from 0, that is not in `skipped`.

  skipped [range(2, 4), range(6, 7)]: i = 0, 1, 2, 3, 4 -> 0, 1, 4, 5, 7
  """
  end = 0
  for rows in sorted(skipped, key=lambda rows: rows.start):
    first = max(rows.start, end)  # Ranges may overlap.
    if i >= first:
      i += max(0, rows.stop - first)
    end = max(end, rows.stop)
  return i


class Remaining:
  """Rows of a loader without the skipped rows: `remaining[i]` is the i-th remaining row.

  A checkpoint's `next_row` counts only remaining rows. Rows that were read before a checkpoint are
  never skipped later, so this count stays valid.
  """

  def __init__(self, loader: RowLoader, skipped: Sequence[range] = ()):
    self.plan, self._loader, self._skipped = loader.plan, loader, tuple(skipped)

  def number(self, i: int) -> int:
    """Returns the index, in the loader, of the i-th remaining row."""
    return row_number(i, self._skipped)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return self._loader[self.number(i)]


def read(folder: epath.Path) -> list[GoBack]:
  """Reads which rows a run skips. Raises UserError if the record of these rows is damaged."""
  path = folder / RECORD
  if not exists(path):
    return []
  entries = read_json(path)
  try:
    if not isinstance(entries, list):
      raise TypeError
    return [
      GoBack(int(x["resume_from"]), range(int(x["first"]), int(x["last"]) + 1)) for x in entries
    ]
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{path} is damaged: it must be a list of ranges of rows.") from error


def check(back: GoBack, done: list[GoBack], next_row: int) -> None:
  """Checks that a checkpoint was saved before the run read the first of the rows to skip.

  `done` is the result of `read`. `next_row` of the checkpoint counts only rows of `Remaining`.

  Raises:
    UserError: some of these rows were read before the checkpoint.
  """
  first = row_number(next_row, [earlier.rows for earlier in done])
  if back.rows.start < first:
    raise UserError(
      f"--skip_rows begins with row {back.rows.start}, but up to checkpoint {back.step} the run "
      f"has read all rows before {first}: resume from an earlier checkpoint, or skip later rows."
    )


def go_back(checkpoints: Checkpoints, folder: epath.Path, back: GoBack) -> None:
  """Deletes the checkpoints and log lines after a step, and records the rows to skip.

  If the process is killed here, before the record is written, the run only continues from `step`.

  Raises:
    UserError: there is no such checkpoint, or it is damaged.
  """
  recovery.check_target(checkpoints, back.step)
  checkpoints.delete_after(back.step)
  with distributed.together():
    if distributed.is_first():
      log = MetricsLog(folder / "metrics", back.step)
      log.write(back.step, {"event": "left_out", **back.as_json})
      log.flush()
      entries = [x.as_json for x in [*read(folder), back]]
      write_json(folder / RECORD, entries)
      print(
        f"train: goes back to checkpoint {back.step}, and then skips rows {back.rows[0]} to "
        f"{back.rows[-1]} (recorded in {folder / RECORD}).",
        flush=True,
      )
