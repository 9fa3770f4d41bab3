"""A person looks after the checkpoints of a run: lists, verifies, prunes them, rolls them back."""

from collections.abc import Sequence
import dataclasses
import datetime

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json_lines
from cm3leon_jax.stages import DONE
from cm3leon_jax.training import retention
from cm3leon_jax.training.checkpoint import FOLDER, Checkpoints
from cm3leon_jax.training.lease import Lease
from cm3leon_jax.training.metrics import LOG, cut_log
from cm3leon_jax.training.sealing import files_below

MODALITIES = ("", "image_", "text_")


@dataclasses.dataclass(frozen=True)
class Entry:
  """A checkpoint in the list.

  Attributes:
    step: of it.
    time: when it was written, Unix seconds.
    size: bytes of its files.
    sealed: whether it has digests; one that has none does not count.
    losses: held-out losses that were logged at its step, by modality; "" is all.
  """

  step: int
  time: float
  size: int
  sealed: bool
  losses: dict[str, float]


def open_run(folder: epath.Path) -> Checkpoints:
  """Opens the checkpoints of a run. Raises UserError if it has none."""
  _require(folder)
  return Checkpoints(folder, keep=1_000_000)


def _require(folder: epath.Path) -> None:
  if not (folder / FOLDER).exists():
    raise UserError(f"{folder} has no checkpoints: --workdir must be the folder of a run.")


def entries(checkpoints: Checkpoints) -> list[Entry]:
  """Lists all checkpoints that are complete on disk, sorted by step."""
  run = checkpoints.folder.parent
  losses = _heldout_losses(run)
  sealed = set(checkpoints.sealed())
  return [
    Entry(
      step,
      float((checkpoints.folder / str(step)).stat().mtime),
      _size(checkpoints.folder / str(step)),
      step in sealed,
      losses.get(step, {}),
    )
    for step in checkpoints.steps()
  ]


def table(found: Sequence[Entry], states: dict[int, str]) -> list[str]:
  """Formats a line for each checkpoint, after one with the names of the columns.

  Args:
    found: checkpoints.
    states: what is known beside "sealed", by step: "whole", "damaged".
  """
  lines = [f"{'step':>10}  {'written (UTC)':16}  {'size':>9}  {'state':10}  held-out loss, nats"]
  for entry in found:
    when = datetime.datetime.fromtimestamp(entry.time, datetime.UTC)
    state = states.get(entry.step, "sealed" if entry.sealed else "not sealed")
    losses = [
      f"{kind.strip('_') or 'loss'} {x:.3f}".removeprefix("loss ")
      for kind, x in entry.losses.items()
    ]
    lines.append(
      f"{entry.step:>10,}  {when:%Y-%m-%d %H:%M}  {_bytes(entry.size):>9}  {state:10}  "
      f"{' '.join(losses) or '-'}"
    )
  return lines


def verify(checkpoints: Checkpoints, found: Sequence[Entry]) -> dict[int, str]:
  """Compares the files of sealed checkpoints with their digests; reads them whole.

  Returns:
    What is damaged, a sentence by step; "" of those that are whole. One that a running job has
    removed meanwhile is absent.
  """
  damages = {}
  for entry in found:
    damage = checkpoints.damage(entry.step) if entry.sealed else None
    if entry.sealed and (damage is None or (checkpoints.folder / str(entry.step)).exists()):
      damages[entry.step] = damage or ""
  return damages


def prune(folder: epath.Path, last: int, every: int, best: int) -> list[str]:
  """Removes the sealed checkpoints that `retention.policy` does not keep.

  Returns:
    What was done, a sentence.

  Raises:
    UserError: another job holds the run's lease.
  """
  _require(folder)
  with Lease(folder), open_run(folder) as checkpoints:
    found = {entry.step: entry for entry in entries(checkpoints) if entry.sealed}
    losses = {step: entry.losses[""] for step, entry in found.items() if "" in entry.losses}
    kept = retention.kept(list(found), losses, last, every, best)
    removed = [step for step in found if step not in kept]
    size = sum(found[step].size for step in removed)
    for step in removed:
      checkpoints.delete(step)
  freed = f"removed checkpoints {_steps(removed)}, {_bytes(size)}" if removed else "removed nothing"
  return [f"{freed}; kept {_steps(sorted(kept))}."]


def rollback(folder: epath.Path, step: int) -> list[str]:
  """Removes all checkpoints after a step, what the log has after it, and that the run is finished.

  Returns:
    What was done, sentences.

  Raises:
    UserError: there is no whole checkpoint of the step, or another job holds the run's lease.
  """
  _require(folder)
  with Lease(folder), open_run(folder) as checkpoints:
    if step not in checkpoints.sealed():
      raise UserError(
        f"{folder} has no sealed checkpoint of step {step}: it has "
        f"{_steps(checkpoints.sealed()) or 'none'}."
      )
    if damage := checkpoints.damage(step):
      raise UserError(f"{damage}; roll back to another step.")
    sentences = []
    newer = [s for s in checkpoints.steps() if s > step]
    if (folder / DONE).exists() and newer:
      (folder / DONE).unlink()
      sentences.append(f"removed {folder / DONE}: the run is not finished any more.")
    for s in reversed(newer):
      checkpoints.delete(s)
    sentences.append(
      f"removed checkpoints {_steps(newer)}." if newer else "no checkpoint is newer."
    )
    if (last := cut_log(folder / "metrics", step)) > step:
      sentences.append(f"removed steps {step + 1:,} to {last:,} from metrics/{LOG}.")
  return [*sentences, f"launch.train continues from step {step:,}."]


def _heldout_losses(run: epath.Path) -> dict[int, dict[str, float]]:
  found: dict[int, dict[str, float]] = {}
  for line in read_json_lines(run / "metrics" / LOG):
    if "heldout_loss" in line:
      names = {kind: f"heldout_{kind}loss" for kind in MODALITIES}
      found[line["step"]] = {kind: line[name] for kind, name in names.items() if name in line}
  return found


def _size(folder: epath.Path) -> int:
  return sum((folder / name).stat().length for name in files_below(folder))


def _steps(steps: Sequence[int]) -> str:
  return ", ".join(f"{step:,}" for step in steps)


def _bytes(size: int) -> str:
  """Formats a number of bytes: 81.2 MB."""
  if size < 1000:
    return f"{size} B"
  power = min((len(str(size)) - 1) // 3, 4)
  return f"{size / 1000**power:.1f} {'kMGT'[power - 1]}B"
