"""Writes metrics.jsonl, one JSON object per line."""

import json
import os
import time

from etils import epath

from cm3leon_jax import distributed
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_json_lines

LOG = "metrics.jsonl"
FIELDS = {"step": int}  # Every line must have these fields.
# In a GCS bucket, the whole file is written at most once per this number of seconds, and for at
# most 1% of the run's time.
BUCKET_SECONDS = 60.0


def check_log(folder: epath.Path, checkpoint_every: int) -> None:
  """Checks the log of a run without checkpoints. All processes must call it.

  Raises:
    UserError: the log shows that the run has passed a step at which it saves a checkpoint.
  """
  with distributed.together():
    lines = read_json_lines(folder / "metrics" / LOG, FIELDS) if distributed.is_first() else []
    last = max((line["step"] for line in lines if "loss" in line), default=0)
    if last > 2 * checkpoint_every:  # The first save is complete before the second save starts.
      raise UserError(
        f"{folder} has logged {last} steps and has no checkpoint: restore its folder checkpoints, "
        f"or, if none was ever saved, delete {folder} to start from step 0."
      )


def cut_log(folder: epath.PathLike, step: int, **fields: int) -> int:
  """Removes the lines after `step` from the log of a run, and logs this removal as an event.

  `fields` are more fields of the event. Returns the last step that was logged, or `step` if the log
  has no later step.
  """
  lines = read_json_lines(epath.Path(folder) / LOG, FIELDS)
  last = max((line["step"] for line in lines), default=step)
  if last <= step:
    return step
  log = MetricsLog(folder, step)
  # Goodput counts the time of removed lines as lost.
  end = max((line["time"] for line in lines if "time" in line), default=0)
  log.write(step, {"event": "rolled_back", "from_step": last, **fields, "time": end})
  log.flush()
  return last


class MetricsLog:
  """Writes `folder/metrics.jsonl`.

  A killed run may have logged steps after its last checkpoint. The resumed run computes these steps
  again. `MetricsLog` keeps the earlier losses in memory and checks that the new losses are bitwise
  equal.

  On a disk, each line is appended. A GCS bucket does not support appending, so there the whole file
  is written periodically and by `flush`.
  """

  def __init__(self, folder: epath.PathLike, resumed_at: int | None = None, enabled: bool = True):
    """Opens the file and removes the lines of steps that the resumed run computes again.

    Args:
      resumed_at: step of the restored checkpoint. Lines of later steps are removed. None: a new
        run.
      enabled: whether this process reads and writes the log; True in one process of a run.

    Raises:
      UserError: a line before the last line is damaged.
    """
    self.path, self.enabled = epath.Path(folder) / LOG, enabled
    self.before = read_json_lines(self.path, FIELDS) if enabled else []
    self.replayed, self.identical, self._resumed_at = 0, 0, resumed_at
    old = [] if resumed_at is None else self.before
    self._expected = {
      line["step"]: line["loss"] for line in old if line["step"] > resumed_at and "loss" in line
    }
    self._text = "".join(json.dumps(line) + "\n" for line in old if line["step"] <= resumed_at)
    if resumed_at is not None and not self._expected:
      self._text += self._resume_event(resumed_at)  # There are no earlier losses to compare.
    self._appends = "://" not in os.fspath(self.path)
    if enabled:
      self._write_all()

  def write(self, step: int, values: dict) -> None:
    """Writes one line with `step` and `values`, which are floats, ints or strings."""
    if not self.enabled:
      return
    expected = self._expected.pop(step, None) if "loss" in values else None
    text = json.dumps({"step": step, **values}) + "\n"
    if expected is not None:
      self.replayed += 1
      self.identical += expected == values["loss"]
      if not self._expected:
        text += self._resume_event(step)
    if self._appends:
      with self.path.open("a") as f:
        f.write(text)
      return
    self._text += text
    if time.monotonic() - self._flushed > max(BUCKET_SECONDS, 100 * self._cost):
      self.flush()

  def flush(self) -> None:
    """Stores all lines in a GCS bucket. Called before a checkpoint is sealed."""
    if self.enabled and not self._appends:
      self._write_all()

  def _write_all(self) -> None:
    start = time.monotonic()
    with replacing(self.path, "w") as f:
      f.write(self._text)
    self._flushed = time.monotonic()
    self._cost = self._flushed - start

  def _resume_event(self, step: int) -> str:
    counts = {"from_step": self._resumed_at, "replayed": self.replayed, "identical": self.identical}
    return json.dumps({"step": step, "event": "resumed", **counts}) + "\n"
