"""Skips rows of a run: the flag --skip_rows of `cm3leon checkpoints rollback`."""

from collections.abc import Sequence
import re

from etils import epath
import numpy as np

from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import read_json, write_json

RECORD = "left_out_rows.json"


def parse(skip_rows: str) -> range | None:
  """Parses --skip_rows: "4000:4799" -> range(4000, 4800), "" -> None.

  Raises:
    UserError: `skip_rows` is not a pair FIRST:LAST.
  """
  if not skip_rows:
    return None
  match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", skip_rows)
  if not match or int(match[1]) > int(match[2]):
    raise UserError(
      f"--skip_rows is '{skip_rows}'; it must be FIRST:LAST, the numbers of the first and the last "
      "row to leave out, e.g. 4000:4799."
    )
  return range(int(match[1]), int(match[2]) + 1)


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


def read(folder: epath.Path) -> list[range]:
  """Reads which rows a run skips. Raises UserError if the record of these rows is damaged."""
  path = folder / RECORD
  if not exists(path):
    return []
  try:
    return [range(int(x["first"]), int(x["last"]) + 1) for x in read_json(path)]
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{path} is damaged: it must be a list of ranges of rows.") from error


def record(folder: epath.Path, rows: range, step: int) -> None:
  """Adds rows to the record, for a run that continues from the checkpoint of `step`."""
  path = folder / RECORD
  entries = read_json(path) if exists(path) else []
  entry = {"resume_from": step, "first": rows[0], "last": rows[-1]}
  write_json(path, [*entries, entry])


def check(rows: range, done: Sequence[range], step: int, next_row: int) -> None:
  """Checks that the checkpoint of `step` was saved before the run read the first of `rows`.

  `done` is the result of `read`. `next_row` of the checkpoint counts only rows of `Remaining`.

  Raises:
    UserError: some of these rows were read before the checkpoint.
  """
  first = row_number(next_row, done)
  if rows.start < first:
    raise UserError(
      f"--skip_rows begins with row {rows.start}, but up to checkpoint {step} the run has read all "
      f"rows before {first}: go back to an earlier checkpoint, or skip later rows."
    )
