"""Where the windows of a row plan start, kept in a file, so that a run that continues plans only the window it stands in."""

import bisect
import dataclasses
import hashlib
import json
import typing

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.io import replacing

BUCKET_BATCH = 16  # Objects in a bucket cannot be appended to: the file is written anew, once in so many windows.
SPOTS = 4_096  # Values of each array that go into the fingerprint, evenly spaced.


class Start(typing.NamedTuple):
  """Of a window: its first row, and for each source the units taken and the slots used by the windows before it."""

  first_row: int
  taken: tuple[int, ...]
  used: tuple[int, ...]


def fingerprint(sources, config, max_spans: int, seed: int) -> str:
  """Digest of what a plan follows from; of the stores, their sizes and evenly spaced lengths and neighbors."""
  fields = {
    k: v
    for k, v in dataclasses.asdict(config).items()
    if k not in ("read_threads", "neighbor_loss_weight")
  }
  digest = hashlib.sha256(
    json.dumps([seed, max_spans, fields, [s.share for s in sources]]).encode()
  )
  for source in sources:
    stores = [source.store] if source.bank is None else [source.store, source.bank]
    arrays = [x for store in stores for x in (store.offsets, store.lengths)]
    for array in arrays if source.neighbors is None else [*arrays, source.neighbors]:
      digest.update(repr(array.shape).encode())
      digest.update(np.asarray(array[:: max(1, len(array) // SPOTS)], np.int64).tobytes())
  return digest.hexdigest()


class WindowStarts:
  """A list of `Start`, that of window 0 first; the last is that of the first window not planned yet.

  With a path it begins with what stands there. Its first line is `{"fingerprint": ...}`; those that follow are one window
  each, from 1 on: `{"window": 1, "first_row": 9012, "taken": [..], "used": [..]}`. A file with another fingerprint counts as
  empty; what follows a line that was cut short is left out.
  """

  def __init__(
    self,
    num_sources: int,
    path: epath.PathLike | None = None,
    identity: str = "",
    writes: bool = False,
  ):
    """identity: the fingerprint of the plan. writes: `path` is brought up to date as starts are added."""
    self._path = epath.Path(path) if path else None
    self._header, self._writes = _line({"fingerprint": identity}), bool(path) and writes
    self._starts = [Start(0, (0,) * num_sources, (0,) * num_sources)]
    self._whole = (
      False  # The file holds these starts and nothing else, so that lines can be appended.
    )
    if self._path and self._path.exists():
      self._read(self._path.read_text())

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, window: int) -> Start:
    return self._starts[window]

  def window_of(self, row: int) -> int:
    """The window that holds `row`; all rows from the last start on count to its window."""
    return bisect.bisect_right(self._starts, row, key=lambda s: s.first_row) - 1

  def add(self, window: int, start: Start) -> None:
    """Takes over the start of `window`, which is known already or the next one.

    Raises:
      UserError: it is known and was another.
    """
    if window < len(self._starts):
      if self._starts[window] != start:
        raise UserError(
          f"{self._path} says that window {window} starts at {self._starts[window]}, the plan says {start}: the data or the "
          "code changed since it was written; delete it."
        )
      return
    self._starts.append(start)
    if self._writes:
      self._write(window)

  def _read(self, text: str) -> None:
    if not text.startswith(self._header):
      return
    rest = text[len(self._header) :]
    for line in rest.splitlines(keepends=True):
      try:
        fields = json.loads(line)
      except json.JSONDecodeError:
        return
      if not line.endswith("\n") or fields.pop("window") != len(self._starts):
        return
      self._starts.append(Start(fields["first_row"], tuple(fields["taken"]), tuple(fields["used"])))
    self._whole = True

  def _write(self, window: int) -> None:
    bucket = "://" in str(self._path)
    lines = lambda first: "".join(
      _line({"window": i, **self._starts[i]._asdict()}) for i in range(first, len(self))
    )
    if self._whole and not bucket:
      with self._path.open("a") as f:
        f.write(lines(window))
    elif not bucket or window % BUCKET_BATCH == 0:
      with replacing(self._path, "w") as f:
        f.write(self._header + lines(1))
      self._whole = True


def _line(fields: dict) -> str:
  return json.dumps(fields) + "\n"
