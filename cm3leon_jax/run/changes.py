"""Checks which fields of the config may change when a run continues."""

from collections.abc import Sequence

from etils import epath

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.stages.stages import check_same_config, differences

# The checkpoint has another structure with an average than without one.
AVERAGE = "optimizer.ema_decay"
# Other fields describe the rows, or the structure of the checkpoint.
_OPTIMIZER = (
  *("learning_rate", "warmup_steps", "schedule", "final_fraction", "b1", "b2", "eps"),
  *("weight_decay", "decay_embeddings", "clip_norm", "z_loss", "ema_decay"),
)
MAY_CHANGE = (*(f"optimizer.{name}" for name in _OPTIMIZER), "train.global_batch_size")


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
  return list(changes.values())
