"""metrics.jsonl: one JSON object a line; a resumed run replaces and compares what it recomputes."""

import json
import os
import time

from etils import epath

from cm3leon_jax import distributed
from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json_lines, replacing

LOG = "metrics.jsonl"
FIELDS = {"step": int}  # Of every line.
# In a bucket the file is written at most once in that time, and for at most 1% of the time.
BUCKET_SECONDS = 60.0


def check_log(folder: epath.Path, checkpoint_every: int) -> None:
  """Checks the log of a run without checkpoints; all processes call it.

  Args:
    folder: of the run.
    checkpoint_every: steps between two checkpoints.

  Raises:
    UserError: it has steps that must have been saved.
  """
  with distributed.together():
    lines = read_json_lines(folder / "metrics" / LOG, FIELDS) if distributed.is_first() else []
    last = max((line["step"] for line in lines if "loss" in line), default=0)
    if last > 2 * checkpoint_every:  # Then the first save is complete.
      raise UserError(
        f"{folder} has logged {last} steps and has no checkpoint: restore its folder checkpoints, "
        f"or, if none was ever saved, delete {folder} to start from step 0."
      )


def cut_log(folder: epath.PathLike, step: int, dry_run: bool = False) -> int:
  """Removes the lines after a step from the log of a run, and notes it in the log.

  Args:
    folder: of the log.
    step: that the run goes back to.
    dry_run: whether to leave the log as it is.

  Returns:
    The last step that was logged; `step` if none was after it.
  """
  path = epath.Path(folder) / LOG
  lines = read_json_lines(path, FIELDS)
  last = max((line["step"] for line in lines), default=step)
  if dry_run or last <= step:
    return max(last, step)
  kept = [line for line in lines if line["step"] <= step]
  event = {"step": step, "event": "rolled_back", "from_step": last}
  times = [line["time"] for line in lines if "time" in line]
  if times:  # Goodput counts the removed time as lost.
    event["time"] = times[-1]
  with replacing(path, "w") as file:
    file.write("".join(json.dumps(line) + "\n" for line in [*kept, event]))
  return last


class MetricsLog:
  """Writes `folder/metrics.jsonl`.

  A killed run has logged steps after its last checkpoint. The resumed run computes them again; the
  log keeps the first losses in memory and compares them bit for bit.

  On a disk every line is appended. Objects in a bucket cannot be appended to: there the whole file
  is written from time to time and at `flush`.
  """

  def __init__(self, folder: epath.PathLike, resumed_at: int | None = None, enabled: bool = True):
    """Opens the file, without the lines that a resumed run computes again.

    Args:
      folder: gets the file.
      resumed_at: step of the restored checkpoint; lines of later steps are removed. None: a new
        run.
      enabled: whether this process reads and writes; one process of a run does.
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
      self._text += self._resume_event(resumed_at)  # Nothing to compare is an outcome too.
    self._appends = "://" not in os.fspath(self.path)
    self._rewrite()

  def write(self, step: int, values: dict) -> None:
    """Writes one line, `step` first; values are floats, ints or strings."""
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
    """Returns when every line is stored; called before a checkpoint counts."""
    if self.enabled and not self._appends:
      self._rewrite()

  def _rewrite(self) -> None:
    if not self.enabled:
      return
    start = time.monotonic()
    with replacing(self.path, "w") as f:
      f.write(self._text)
    self._flushed = time.monotonic()
    self._cost = self._flushed - start

  def _resume_event(self, step: int) -> str:
    counts = {"from_step": self._resumed_at, "replayed": self.replayed, "identical": self.identical}
    return json.dumps({"step": step, "event": "resumed", **counts}) + "\n"
