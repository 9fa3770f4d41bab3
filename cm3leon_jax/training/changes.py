"""Checks which fields of the config may change when a run continues, and describes the effects."""

from collections.abc import Sequence

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.runs.stages import check_same_config, differences

_SCHEDULE = "the learning rate follows the new schedule from the next step on, and may jump"
_UPDATES = "it applies from the next step on; the optimizer keeps its moments"
# Field -> effect of the change.
MAY_CHANGE = {
  "optimizer.learning_rate": _SCHEDULE,
  "optimizer.warmup_steps": _SCHEDULE,
  "optimizer.schedule": _SCHEDULE,
  "optimizer.final_fraction": _SCHEDULE,
  "optimizer.b1": _UPDATES,
  "optimizer.b2": _UPDATES,
  "optimizer.eps": _UPDATES,
  "optimizer.weight_decay": _UPDATES,
  "optimizer.decay_embeddings": _UPDATES,
  "optimizer.clip_norm": _UPDATES,
  "optimizer.z_loss": "a term of the loss changes, so losses before and after are not comparable",
  "optimizer.ema_decay": "the average moves at another rate from the next step on",
  "train.global_batch_size": "the data continues at its next row, but train.steps and the learning "
  "rate count steps of another size, and held-out losses are computed on another number of rows",
}
# Field or section -> why it must not change; the longest matching name is used.
MAY_NOT = {
  "optimizer": "the optimizer's state in the checkpoint has another structure",
  "optimizer.ema_decay": "an average can be neither added to the checkpoint nor removed from it",
  "adapter": "the checkpoint's adapters have other shapes or another scale",
  "model": "the checkpoint's parameters belong to another decoder",
  "vocab": "the same ids would mean other tokens",
  "data": "the rows of the run are planned from it, so some would occur twice or never",
  "instructions": "the rows of the run are planned from it, so some would occur twice or never",
  "inputs": "the documents or their neighbors were created again, so the rows would differ",
  "seed": "the order of the rows would change, so some would occur twice or never",
  "init_from": "the run has started from other parameters",
  "reinforce": "the run learns from other rewards",
}


def check_changes(
  folder: epath.Path, stored: dict, config: dict, allowed: Sequence[str]
) -> list[str]:
  """Checks the differences between the config of a run and the config of its next start.

  `stored` contains the settings, from the run's config.json, that the run depends on. `config`
  contains their values at the next start. Only fields in `allowed` may change. Returns one sentence
  per change, with the field, its old and new value, and the effect.

  Raises:
    UserError: a changed field is not in `allowed`, or must never change.
  """
  for name in allowed:
    if name not in MAY_CHANGE:
      raise UserError(_refusal(name))
  sentences, others = [], []
  for change in differences(stored, plain(config)):
    name = change.partition(":")[0]
    if name == "optimizer.ema_decay" and not all(
      fields["optimizer"].get("ema_decay") for fields in (stored, config)
    ):
      if name in allowed:
        raise UserError(_refusal(name))
      others.append(name)
    elif name in allowed:
      sentences.append(f"{change}: {MAY_CHANGE[name]}")
    else:
      others.append(name)
  if others and all(name in MAY_CHANGE for name in others) and "optimizer.ema_decay" not in others:
    changed = [c for c in differences(stored, plain(config)) if c.partition(":")[0] in others]
    raise UserError(
      f"{folder} was made with another config ({'; '.join(changed)}): use another --workdir, or "
      f"continue the run with the change: --allow_changed={','.join([*allowed, *others])}"
    )
  if others:
    check_same_config(folder, stored, config)
  return sentences


def _refusal(name: str) -> str:
  fits = [part for part in MAY_NOT if f"{name}.".startswith(f"{part}.")]
  if not fits or name == "optimizer":
    return f"--allow_changed names '{name}'; it may name {', '.join(MAY_CHANGE)}."
  reason = MAY_NOT[max(fits, key=len)]
  return (
    f"--allow_changed names {name}, which must not change within a run: {reason}; use another "
    "--workdir, or --init_from=RUN to start from trained parameters."
  )
