"""Lists, verifies, prunes and rolls back the checkpoints of a run; needs no config.

  cm3leon checkpoints list --workdir=workdir/scenes
  cm3leon checkpoints verify --workdir=workdir/scenes
  cm3leon checkpoints prune --workdir=workdir/scenes --keep_last=2 --keep_every=1000
  cm3leon checkpoints rollback --workdir=workdir/scenes --step=800 --dry_run

list: prints the step, time, size and held-out losses of each checkpoint, and whether it is sealed.
verify: reads all files and compares them with their digests.
prune: removes the checkpoints that no flag keeps. Without flags, the run's config decides.
rollback: removes the checkpoints after --step and the later lines of metrics.jsonl, so that
`cm3leon train` continues from --step.
prune and rollback do not ask for confirmation. They fail while another job trains in the workdir,
and wait up to 90 s if a job was killed on another host. --dry_run prints what they would remove.
"""

import re

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json

with epy.lazy_imports():
  from cm3leon_jax.training.saves import upkeep

ACTIONS = ("list", "verify", "prune", "rollback")
_STEP = flags.DEFINE_string("step", None, "rollback: step to return to, e.g. 1600 or 1,600.")
_KEEP_LAST = flags.DEFINE_integer(
  "keep_last", None, "prune: number of newest checkpoints to keep, at least 2.", lower_bound=2
)
_KEEP_EVERY = flags.DEFINE_integer(
  "keep_every",
  None,
  "prune: also keep every checkpoint whose step is a multiple of this; 0 disables it.",
  lower_bound=0,
)
_KEEP_BEST = flags.DEFINE_integer(
  "keep_best",
  None,
  "prune: also keep this many checkpoints with the lowest held-out loss.",
  lower_bound=0,
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "prune, rollback: print what would be removed, and remove nothing."
)
TAKEN_BY = {
  "step": ("rollback",),
  "keep_last": ("prune",),
  "keep_every": ("prune",),
  "keep_best": ("prune",),
  "dry_run": ("prune", "rollback"),
}


def _check_flags(action: str) -> None:
  """Raises UserError if a flag is given that `action` does not accept."""
  for name, takers in TAKEN_BY.items():
    if flags.FLAGS[name].present and action not in takers:
      only = f"only {' and '.join(takers)} {'does' if len(takers) == 1 else 'do'}"
      raise UserError(f"--{name} is given, but {action} does not take it: {only}.")


def _step() -> int:
  """Returns the value of --step. Raises UserError if it is missing or not a number."""
  if _STEP.value is None:
    raise UserError(
      "rollback needs the step to return to: give --step=STEP; `list` shows all steps."
    )
  if not re.fullmatch(r"[0-9]{1,3}(,[0-9]{3}){1,4}|[0-9]{1,15}", _STEP.value):
    raise UserError(
      f"--step is '{_STEP.value}'; it must be the step of a checkpoint, such as 1600 or 1,600; "
      "`list` shows all steps."
    )
  return int(_STEP.value.replace(",", ""))


def _limits(folder: epath.Path) -> tuple[int, int, int]:
  """Returns (keep_last, keep_every, keep_best) from the flags or, without flags, the config."""
  given = (_KEEP_LAST.value, _KEEP_EVERY.value, _KEEP_BEST.value)
  if any(value is not None for value in given):
    if given[0] is None:
      raise UserError("prune: also give the number of newest checkpoints to keep: --keep_last=2")
    return given[0], given[1] or 0, given[2] or 0
  config = read_json(folder / "config.json")["settings"]["train"]
  return config["keep_checkpoints"], config.get("keep_every", 0), config.get("keep_best", 0)


def _show(folder: epath.Path, check: bool) -> None:
  """Prints the checkpoints. If `check`, raises UserError if one is damaged or none is sealed."""
  with upkeep.open_run(folder) as checkpoints:
    found = upkeep.entries(checkpoints)
    damages = upkeep.verify(checkpoints, found) if check else {}
  states = {step: "damaged" if damage else "whole" for step, damage in damages.items()}
  title = f"{folder}: {len(found)} checkpoint{'' if len(found) == 1 else 's'}"
  print("\n".join([title, *upkeep.table(found, states)]), flush=True)
  if check:
    upkeep.check_verified(folder, found, damages)


def main(action: str, workdir: epath.Path) -> None:
  _check_flags(action)
  step = _step() if action == "rollback" else 0
  folder = workdir / "train"
  upkeep.require(folder)
  if action == "prune":
    sentences = upkeep.prune(folder, *_limits(folder), dry_run=_DRY_RUN.value)
  elif action == "rollback":
    sentences = upkeep.rollback(folder, step, dry_run=_DRY_RUN.value)
  else:
    _show(folder, check=action == "verify")
    return
  print("\n".join(sentences))


if __name__ == "__main__":
  common.run(main, config=False, actions=ACTIONS)
