"""Fields of a run's config that may change while it goes on, and what follows from that."""

from collections.abc import Sequence

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.runs.stages import check_same_config, differences

_SCHEDULE = "the learning rate is that of the new schedule from the next step on, and may jump"
_UPDATES = "it counts from the next step on; the optimizer keeps its moments"
# Field -> what follows.
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
  "optimizer.z_loss": "the loss has another term, so losses before and after do not compare",
  "optimizer.ema_decay": "the average moves at another rate from the next step on",
  "train.global_batch_size": "the data goes on at its next row, but train.steps and the learning "
  "rate count steps of another size, and held-out losses are of other numbers of rows",
}
# Field or section -> why it may not; the longest name that fits counts.
MAY_NOT = {
  "optimizer": "the optimizer's state in the checkpoint is of another kind",
  "optimizer.ema_decay": "a checkpoint has an average of the parameters, or has none",
  "model": "the checkpoint's parameters are of another decoder",
  "vocab": "the same ids would mean other tokens",
  "data": "the rows of the run are planned with it, and some would come twice or never",
  "instructions": "the rows of the run are planned with it, and some would come twice or never",
  "inputs": "the documents or their neighbors were made again, so rows would be others",
  "seed": "the rows would come in another order, and some twice or never",
  "init_from": "the run has begun from other parameters",
  "reinforce": "the run learns from other rewards",
}


def check_changes(
  folder: epath.Path, stored: dict, config: dict, allowed: Sequence[str]
) -> list[str]:
  """Checks what differs between a run and the config that is to continue it.

  Args:
    folder: of the run, for messages.
    stored: what the run depends on, as its config.json says.
    config: the same of the new start.
    allowed: names of fields whose change the user allows.

  Returns:
    A sentence for each change: the field, its values, and what follows.

  Raises:
    UserError: a field differs that is not allowed, or must not change.
  """
  for name in allowed:
    if name not in MAY_CHANGE:
      raise UserError(_refusal(name))
  sentences, others = [], []
  for change in differences(stored, plain(config)):
    name = change.partition(":")[0]
    if name == "optimizer.ema_decay" and not _both_average(stored, config):
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
      f"{folder} holds the run of another config ({'; '.join(changed)}): use another --workdir, or "
      f"continue the run with the change: --allow_changed={','.join([*allowed, *others])}"
    )
  if others:
    check_same_config(folder, stored, config)
  return sentences


def _both_average(stored: dict, config: dict) -> bool:
  return bool(stored["optimizer"].get("ema_decay") and config["optimizer"].get("ema_decay"))


def _refusal(name: str) -> str:
  fits = [part for part in MAY_NOT if f"{name}.".startswith(f"{part}.")]
  if not fits or name == "optimizer":
    return f"--allow_changed names '{name}'; it may name {', '.join(MAY_CHANGE)}."
  reason = MAY_NOT[max(fits, key=len)]
  return (
    f"--allow_changed names {name}, which must not change within a run: {reason}; use another "
    "--workdir, or --init_from=RUN to start from trained parameters."
  )
