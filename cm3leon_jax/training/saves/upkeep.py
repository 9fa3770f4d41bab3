"""Lists, verifies and rolls back the checkpoints of a run."""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime

from etils import epath

from cm3leon_jax.data.rows import skipped_rows
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.stages.stages import DONE
from cm3leon_jax.training.faults.lease import Lease
from cm3leon_jax.training.watch.metrics import LOG, cut_log
from cm3leon_jax.weights import recovery
from cm3leon_jax.weights.checkpoint import FOLDER, Checkpoints
from cm3leon_jax.weights.recovery import listed
from cm3leon_jax.weights.sealing import files_below

MODALITIES = ("", "image_", "text_")


@dataclasses.dataclass(frozen=True)
class Entry:
  """One checkpoint in the list of a run's checkpoints.

  Attributes:
    time: when the checkpoint was written, in Unix seconds.
    size: size of its files in bytes.
    sealed: whether it has digests. An unsealed checkpoint is never restored.
    losses: held-out losses logged at its step, by modality: "" (all tokens), "image_" or "text_".
  """

  step: int
  time: float
  size: int
  sealed: bool
  losses: dict[str, float]


def open_run(folder: epath.Path) -> Checkpoints:
  """Opens the checkpoints of a run. Raises UserError if the run has no checkpoints."""
  require(folder)
  return Checkpoints(folder, keep=1_000_000)


def require(folder: epath.Path) -> None:
  """Raises UserError if a folder contains no checkpoints."""
  if not (folder / FOLDER).exists():
    raise UserError(f"{folder} has no checkpoints: --workdir must be the folder of a run.")


def entries(checkpoints: Checkpoints) -> list[Entry]:
  """Lists all checkpoints that are complete on disk, sorted by step."""
  losses, sealed = _heldout_losses(checkpoints.folder.parent), set(checkpoints.sealed())
  result = []
  for step in checkpoints.steps():
    path = checkpoints.folder / str(step)
    size = sum((path / name).stat().length for name in files_below(path))
    time = float(path.stat().mtime)
    result.append(Entry(step, time, size, step in sealed, losses.get(step, {})))
  return result


def table(found: Sequence[Entry], states: dict[int, str]) -> list[str]:
  """Formats the checkpoints as lines of a table. The first line has the names of the columns.

  `states` maps the step of each verified checkpoint to "whole" or "damaged", which the table shows
  instead of "sealed".
  """
  lines = [f"{'step':>10}  {'written (UTC)':16}  {'size':>9}  {'state':10}  held-out loss, nats"]
  for entry in found:
    when = datetime.datetime.fromtimestamp(entry.time, datetime.UTC)
    state = states.get(entry.step, "sealed" if entry.sealed else "not sealed")
    losses = [f"{kind.replace('_', ' ')}{x:.3f}" for kind, x in entry.losses.items()]
    lines.append(
      f"{entry.step:>10}  {when:%Y-%m-%d %H:%M}  {_bytes(entry.size):>9}  {state:10}  "
      f"{' '.join(losses) or '-'}"
    )
  return lines


def verify(checkpoints: Checkpoints, found: Sequence[Entry]) -> dict[int, str]:
  """Reads all files of the sealed checkpoints and compares them with their digests.

  Returns step -> message about the damage, or "" if all files match. Leaves out checkpoints that a
  running job has removed in the meantime.
  """
  damages = {}
  for entry in found:
    damage = checkpoints.damage(entry.step) if entry.sealed else None
    if entry.sealed and (damage is None or (checkpoints.folder / str(entry.step)).exists()):
      damages[entry.step] = damage or ""
  return damages


def check_verified(folder: epath.Path, found: Sequence[Entry], damages: Mapping[int, str]) -> None:
  """Raises UserError, with a remedy, if a checkpoint is damaged or if none is sealed.

  `found` is the result of `entries`, and `damages` is the result of `verify`.
  """
  if not damages:
    raise UserError(_not_sealed(folder, [entry.step for entry in found]))
  damaged = [damage for damage in damages.values() if damage]
  if not damaged:
    return
  remedy = f"restore the files from a copy, or delete {folder} to start again"
  if whole := [step for step, damage in damages.items() if not damage]:
    remedy = (
      f"cm3leon train continues from {max(whole)}; if the run is finished, run `cm3leon "
      f"checkpoints rollback --workdir={folder.parent} --step={max(whole)}` first"
    )
  raise UserError(
    f"{len(damaged)} of {len(damages)} sealed checkpoints damaged ({'; '.join(damaged)}): {remedy}."
  )


def _not_sealed(folder: epath.Path, steps: Sequence[int]) -> str:
  """Returns a message that says what to do with a run without a sealed checkpoint."""
  if len(steps) < 2:
    return f"{folder} has no sealed checkpoint: run `cm3leon train`, which saves or seals one."
  return (
    f"{folder} has no sealed checkpoint: {listed(steps)} exist but are not sealed. Restore "
    f"{folder / FOLDER}.digests from a copy, or delete {folder} to start again."
  )


def rollback(folder: epath.Path, step: int, skip_rows: range | None = None) -> list[str]:
  """Removes all checkpoints after a step, the later lines of the log, and the run's done.json.

  `skip_rows` are rows that the run leaves out when it continues; None: it leaves out no more rows.
  Returns sentences about what was removed.

  Raises:
    UserError: the checkpoint of `step` is missing, not sealed or damaged, another job has the run's
      lease, or the run had read some of `skip_rows` at this step.
  """
  with Lease(folder), open_run(folder) as checkpoints:
    if not checkpoints.sealed():
      raise UserError(_not_sealed(folder, checkpoints.steps()))
    recovery.check_target(checkpoints, step)
    fields = {}
    if skip_rows:
      done = skipped_rows.read(folder)
      skipped_rows.check(skip_rows, done, step, checkpoints.next_row(step))
      fields = {"first": skip_rows[0], "last": skip_rows[-1]}
    newer = [s for s in checkpoints.steps() if s > step]
    if not newer and not skip_rows:
      return [f"Step {step} is the newest: nothing to remove."]
    sentences = []
    if (folder / DONE).exists():
      # Delete done.json first: if the rollback is killed, the run then counts as unfinished.
      (folder / DONE).unlink()
      sentences.append(
        f"removed {folder / DONE}: without it the run is not finished, so generate, evaluate and "
        "export use its newest checkpoint, or with train.patience its best one, until cm3leon "
        "train has reached its last step."
      )
    checkpoints.delete_after(step)
    if newer:
      sentences.append(f"removed {_checkpoints(newer)}.")
    if (last := cut_log(folder / "metrics", step, **fields)) > step:
      lines = f"step {last}" if last == step + 1 else f"steps {step + 1} to {last}"
      sentences.append(f"removed {lines} from metrics/{LOG}.")
    then = ""
    if skip_rows:  # Recorded last: no later checkpoint may remain that has read these rows.
      skipped_rows.record(folder, skip_rows, step)
      then = f", without rows {skip_rows[0]} to {skip_rows[-1]}"
  return [*sentences, f"cm3leon train continues from step {step}{then}."]


def _heldout_losses(run: epath.Path) -> dict[int, dict[str, float]]:
  result: dict[int, dict[str, float]] = {}
  for line in read_json_lines(run / "metrics" / LOG):
    if "heldout_loss" in line:
      names = {kind: f"heldout_{kind}loss" for kind in MODALITIES}
      result[line["step"]] = {kind: line[name] for kind, name in names.items() if name in line}
  return result


def _checkpoints(steps: Sequence[int]) -> str:
  """Formats steps as "checkpoint 1600" or "checkpoints 1596, 1600"."""
  return f"checkpoint{'' if len(steps) == 1 else 's'} {listed(steps)}"


def _bytes(size: int) -> str:
  """Formats a number of bytes, e.g. "81.2 MB"."""
  if size < 1000:
    return f"{size} B"
  power = min((len(str(size)) - 1) // 3, 4)
  return f"{size / 1000**power:.1f} {'kMGT'[power - 1]}B"
