"""Writes metrics.jsonl, one JSON object per line, and verifies it when a run resumes."""

import hashlib
import json
import os
import time

from etils import epath

from cm3leon_jax import distributed
from cm3leon_jax.config import UserError
from cm3leon_jax.files.atomic import exists, replacing, sync
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json

LOG = "metrics.jsonl"
DIGEST = "metrics.digest.json"  # Size and SHA-256 of the log when it was last stored.
FIELDS = {"step": int}  # Every line must have these fields.
# In a GCS bucket, the whole file is rewritten, at most once per this number of seconds and for at
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


def cut_log(folder: epath.PathLike, step: int, dry_run: bool = False) -> int:
  """Removes the lines after `step` from the log of a run, and logs this removal as an event.

  With `dry_run`, the log is not changed. Returns the last step that was logged, or `step` if the
  log has no later step.
  """
  path = epath.Path(folder) / LOG
  lines = read_json_lines(path, FIELDS)
  last = max((line["step"] for line in lines), default=step)
  if dry_run or last <= step:
    return max(last, step)
  kept = [line for line in lines if line["step"] <= step]
  event = {"step": step, "event": "rolled_back", "from_step": last}
  times = [line["time"] for line in lines if "time" in line]
  if times:  # Goodput counts the time of removed lines as lost.
    event["time"] = times[-1]
  text = "".join(json.dumps(line) + "\n" for line in [*kept, event])
  as_written = exists(path.parent / DIGEST) and not difference(path, path.parent / DIGEST)
  if as_written:  # If a kill came between the two writes, the old digest would be wrong.
    (path.parent / DIGEST).unlink()
  with replacing(path, "w") as file:
    file.write(text)
  if as_written:
    write_json(path.parent / DIGEST, _describe(text))
  return last


def _describe(text: str) -> dict:
  return {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def difference(path: epath.Path, digest_path: epath.Path) -> str:
  """Describes how a log differs from its digest; "" if they match.

  Checks only the lines that existed when the digest was written.

  Raises:
    UserError: the file of the digest is damaged.
  """
  expected = read_json(digest_path, {"bytes": int, "sha256": str}, remedy="delete it")
  if not exists(path):
    return "is missing"
  content, size = path.read_bytes(), expected["bytes"]
  if len(content) < size:
    return f"has {len(content):,} bytes, {size:,} were written"
  changed = hashlib.sha256(content[:size]).hexdigest() != expected["sha256"]
  return "differs from what was written" if changed else ""


class MetricsLog:
  """Writes `folder/metrics.jsonl`.

  A killed run may have logged steps after its last checkpoint. The resumed run computes these steps
  again. `MetricsLog` keeps the earlier losses in memory and checks that the new losses are bitwise
  equal.

  On a disk, each line is appended. A GCS bucket does not support appending, so there the whole file
  is rewritten periodically and by `flush`.

  A digest of the log is written before each checkpoint. If the log of a resumed run is missing,
  truncated or changed, the run prints a warning and continues, because its steps do not depend on
  the log.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    resumed_at: int | None = None,
    enabled: bool = True,
    digest_folder: epath.PathLike | None = None,
    every: int = 1,
  ):
    """Opens the file and removes the lines of steps that the resumed run computes again.

    Args:
      resumed_at: step of the restored checkpoint. Lines of later steps are removed. None: a new
        run.
      enabled: whether this process reads and writes the log; True in one process of a run.
      digest_folder: receives the file of the digest; None: `folder`.

    Raises:
      UserError: a line before the last line is damaged.
    """
    self.path, self.enabled = epath.Path(folder) / LOG, enabled
    self._digest_path = epath.Path(digest_folder or folder) / DIGEST
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
    if not enabled:
      return
    if resumed_at is not None:
      self._warn_of_difference(resumed_at, every)
    self._digest_path.unlink(missing_ok=True)  # It describes the log before this start.
    self._rewrite()

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
      self._sha256.update(text.encode())
      self._size += len(text.encode())
      return
    self._text += text
    if time.monotonic() - self._flushed > max(BUCKET_SECONDS, 100 * self._cost):
      self.flush()

  def flush(self) -> None:
    """Stores all lines and the digest. Called before a checkpoint is sealed."""
    if self.enabled and not self._appends:
      self._rewrite()
    self.seal()

  def seal(self) -> None:
    """Stores the digest of a log that is on a disk. Called before a checkpoint is written.

    For a log in a GCS bucket, `flush` stores the digest.
    """
    if self.enabled and self._appends:
      sync(self.path)  # After a power loss, the digest must not include lines that are lost.
      write_json(self._digest_path, {"bytes": self._size, "sha256": self._sha256.hexdigest()})

  def _warn_of_difference(self, resumed_at: int, every: int) -> None:
    """Prints a warning if the log differs from what the run wrote, or if it has no digest."""
    last = max((line["step"] for line in self.before if "event" not in line), default=0)
    if exists(self._digest_path):
      wrong = difference(self.path, self._digest_path)
    elif not self.before and resumed_at >= every:
      wrong = "is missing"
    elif self._appends and last + every <= resumed_at:
      wrong = f"ends with step {last:,}"
    else:
      wrong = ""
      print(f"{self.path} is from an earlier version and has no digest, so it is not verified.")
    if wrong:
      print(
        f"warning: {self.path} {wrong}: curves and goodput of the steps up to {resumed_at:,} "
        "are wrong or have gaps. The training does not depend on them and continues; to repair "
        "them, restore the file from a copy and start again.",
        flush=True,
      )

  def _rewrite(self) -> None:
    start = time.monotonic()
    with replacing(self.path, "w") as f:
      f.write(self._text)
    self._sha256, self._size = hashlib.sha256(self._text.encode()), len(self._text.encode())
    write_json(self._digest_path, _describe(self._text))
    self._flushed = time.monotonic()
    self._cost = self._flushed - start

  def _resume_event(self, step: int) -> str:
    counts = {"from_step": self._resumed_at, "replayed": self.replayed, "identical": self.identical}
    return json.dumps({"step": step, "event": "resumed", **counts}) + "\n"
