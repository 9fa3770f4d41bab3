"""Checks which fields of the config may change when a run continues."""

from collections.abc import Sequence

from etils import epath

from cm3leon_jax.data.rows import skipped_rows
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.stages.stages import check_same_config, differences
from cm3leon_jax.weights import reading

# The checkpoint has another structure with an average than without one.
AVERAGE = "optimizer.ema_decay"
# Other fields describe the rows, or the structure of the checkpoint.
_OPTIMIZER = (
  *("learning_rate", "warmup_steps", "schedule", "decay_fraction", "final_fraction"),
  *("b1", "b2", "eps"),
  *("weight_decay", "decay_embeddings", "clip_norm", "z_loss", "ema_decay"),
)
PHASES = "data.phases"
MAY_CHANGE = (*(f"optimizer.{name}" for name in _OPTIMIZER), "train.global_batch_size", PHASES)


def check_changes(
  folder: epath.Path, stored: dict, config: dict, allowed: Sequence[str]
) -> list[str]:
  """Checks the differences between the config of a run and the config of its next start.

  `stored` contains the settings, from the run's config.json, that the run depends on. `config`
  contains their values at the next start. Only fields in `allowed` may change. Returns the changes,
  each with the field, its old and new value.

  Raises:
    UserError: a changed field is not in `allowed`, or must never change.
  """
  may_change = set(MAY_CHANGE)
  if not all(fields["optimizer"].get("ema_decay") for fields in (stored, config)):
    may_change.remove(AVERAGE)
  changes = {change.partition(":")[0]: change for change in differences(stored, plain(config))}
  for name in allowed:
    if name not in may_change and (name != AVERAGE or name in changes):
      raise UserError(
        f"--allow_changed names '{name}'; it may name {', '.join(MAY_CHANGE)}; {AVERAGE} can be "
        "neither added to a run nor removed. For other changes use another --workdir, or "
        "--init_from=RUN to start from trained parameters."
      )
  others = [name for name in changes if name not in allowed]
  if others and may_change.issuperset(others):
    raise UserError(
      f"{folder} was made with another config ({'; '.join(changes[name] for name in others)}): use "
      "another --workdir, or continue the run with the change: "
      f"--allow_changed={','.join([*allowed, *others])}"
    )
  if others:
    check_same_config(folder, stored, config)
  if PHASES in changes:
    _check_begun(folder, *(fields["data"].get("phases", ()) for fields in (stored, plain(config))))
  return list(changes.values())


def _check_begun(folder: epath.Path, stored: Sequence, new: Sequence) -> None:
  """Raises UserError if a phase changed that began before the newest checkpoint."""
  begun = skipped_rows.row_number(reading.next_row(folder), skipped_rows.read(folder))
  old, now = ([[*phase] for phase in phases if phase[0] < begun] for phases in (stored, new))
  if old != now:
    raise UserError(
      f"config.{PHASES} is {[*new]}, but {folder} has read all rows before {begun} with the phases "
      f"{old}: keep these, and begin or change phases from row {begun} on; or go back with "
      "`cm3leon checkpoints rollback`."
    )
