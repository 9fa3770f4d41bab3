"""Stores the starts of the windows of a row plan. A resumed run then plans only one window."""

import bisect
from collections.abc import Sequence
import dataclasses
import hashlib
import json
import typing
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing

# Number of windows per write to a GCS bucket, where each write rewrites the whole file.
BUCKET_BATCH = 16
SPOTS = 4_096  # The fingerprint covers about this many evenly spaced values per array.


class Start(typing.NamedTuple):
  """Start of a window: its first row, and the number of earlier units and positions per source."""

  first_row: int
  taken: tuple[int, ...]
  used: tuple[int, ...]


# Fields of `DataConfig` that change no plan.
UNPLANNED = (
  *("read_threads", "neighbor_loss_weight", "image_loss_weight", "on_bad_record", "max_skipped"),
  "phases",
)


def fingerprint(
  sources: Sequence[Any], config: DataConfig, max_spans: int, seed: int, begin: Start
) -> str:
  """Returns a digest of the inputs of a plan. It covers only evenly spaced values of arrays."""
  fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in UNPLANNED}
  digest = hashlib.sha256(
    json.dumps([seed, max_spans, fields, [s.share for s in sources]]).encode()
  )
  if begin.first_row:
    digest.update(repr(begin).encode())
  for source in sources:
    stores = [source.store, *(() if source.bank is None else source.bank.parts)]
    arrays = [x for store in stores for x in (store.offsets, store.lengths)]
    if source.instructions is not None:
      digest.update(repr(tuple(source.instructions.drops)).encode())
      arrays.append(source.instructions.targets)
    for array in arrays if source.neighbors is None else [*arrays, source.neighbors]:
      digest.update(repr(array.shape).encode())
      digest.update(np.asarray(array[:: max(1, len(array) // SPOTS)], np.int64).tobytes())
  return digest.hexdigest()


class WindowStarts:
  """The starts of all windows from 0 to the first window that is not planned yet.

  The file has a line `{"fingerprint": ...}` and one line for each window except window 0:
  `{"window": 1, "first_row": 9012, "taken": [..], "used": [..], "digest": "9f86d081884c7d65"}`.
  The digest covers all lines up to this line, so it detects changed, missing, swapped and repeated
  lines. An incomplete last line is ignored, because a killed run may leave such a line.
  """

  def __init__(
    self,
    begin: Start,
    path: epath.PathLike | None = None,
    identity: str = "",
    writes: bool = False,
  ):
    """Reads the file `path` if it exists. With `writes`, the method `add` updates the file.

    `begin` is the start of window 0.

    Raises:
      UserError: the fingerprint of the file is not `identity`, or a line changed after it was
        written.
    """
    self._path = epath.Path(path) if path else None
    self._header, self._writes = _line({"fingerprint": identity}), bool(path) and writes
    self._starts = [begin]
    self._digests = [_digest("", self._header)]  # Digests of the header and of each line.
    self._whole = False  # Whether the file contains exactly these starts. If so, `_write` appends.
    if self._path and self._path.exists():
      self._read(self._path.read_bytes().decode(errors="replace"))

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, window: int) -> Start:
    return self._starts[window]

  def window_of(self, row: int) -> int:
    """Returns the window of `row`. Rows after the last start belong to the last window."""
    return bisect.bisect_right(self._starts, row, key=lambda s: s.first_row) - 1

  def add(self, window: int, start: Start) -> None:
    """Adds the start of the next window. Raises UserError if `window` already has another start."""
    if window < len(self._starts):
      if self._starts[window] != start:
        raise UserError(
          f"{self._path} says that window {window} starts at {self._starts[window]}, but the plan "
          f"says {start}: the data or the code changed after the file was written; delete the file."
        )
      return
    self._append(start)
    if self._writes:
      self._write(window)

  def _append(self, start: Start) -> None:
    self._digests.append(_digest(self._digests[-1], _line(_fields(len(self), start))))
    self._starts.append(start)

  def _read(self, text: str) -> None:
    if not text.endswith("\n") and "\n" not in text:
      return  # The run was killed while it wrote the first line.
    if not text.startswith(self._header):
      raise UserError(
        f"{self._path} was written for other rows: documents, neighbors (also by `cm3leon bank "
        "remove`) or the code that plans rows changed after that. Delete the file to continue with "
        "new rows, in which documents of this pass may be missing or repeated, or restore them."
      )
    lines = text[len(self._header) :].split("\n")
    incomplete = lines.pop()  # "" if the last line is complete.
    for number, line in enumerate(lines, 2):
      result = _start_of(line, len(self), len(self._starts[0].taken))
      if result is not None:
        self._append(result[0])
      if result is None or result[1] != self._digests[-1]:
        raise UserError(
          f"{self._path}, line {number} changed after the run wrote it: restore the file from a "
          "copy, or delete this line and all later lines; the run plans their windows again."
        )
    self._whole = not incomplete

  def _write(self, window: int) -> None:
    assert self._path is not None
    bucket = "://" in str(self._path)
    if self._whole and not bucket:
      with self._path.open("a") as f:
        f.write(self._lines(window))
    elif not bucket or window % BUCKET_BATCH == 0:
      self._rewrite()

  def _rewrite(self) -> None:
    assert self._path is not None
    with replacing(self._path, "w") as f:
      f.write(self._header + self._lines(1))
    self._whole = True

  def _lines(self, first: int) -> str:
    return "".join(
      _line({**_fields(i, self._starts[i]), "digest": self._digests[i]})
      for i in range(first, len(self))
    )


def _fields(window: int, start: Start) -> dict:
  return {"window": window, **start._asdict()}


def _digest(before: str, line: str) -> str:
  """Returns a digest of a line and of `before`, which is the digest of all earlier lines."""
  return hashlib.sha256(f"{before}{line}".encode()).hexdigest()[:16]


def _start_of(line: str, window: int, num_sources: int) -> tuple[Start, str | None] | None:
  """Parses the line of `window`. Returns its start and digest, or None for any other line."""
  try:
    fields = json.loads(line)
    first, counts = fields["first_row"], [tuple(fields[name]) for name in ("taken", "used")]
    numbers = [fields["window"], first, *counts[0], *counts[1]]
  except (ValueError, RecursionError, TypeError, KeyError):
    return None
  numeric = all(type(x) is int and x >= 0 for x in numbers)
  lengths = [len(values) for values in counts]
  known = fields.keys() - {"digest"} == _fields(0, Start(0, (), ())).keys()
  right = known and numeric and fields["window"] == window and lengths == [num_sources] * 2
  return (Start(first, *counts), fields.get("digest")) if right else None


def _line(fields: dict) -> str:
  return json.dumps(fields) + "\n"
