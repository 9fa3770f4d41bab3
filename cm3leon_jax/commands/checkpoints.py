"""Lists, verifies and removes the checkpoints of a run; it needs no config.

  cm3leon checkpoints list --workdir=workdir/scenes
  cm3leon checkpoints verify --workdir=workdir/scenes
  cm3leon checkpoints prune --workdir=workdir/scenes --keep_last=2 --keep_every=1000
  cm3leon checkpoints rollback --workdir=workdir/scenes --step=800 --dry_run

list: step, time, size, whether it is sealed, held-out losses. verify: reads all files, and compares
them with their digests. prune: removes those that no flag keeps; without flags, the run's config
counts. rollback: removes the checkpoints after --step, and what metrics.jsonl has after it, so that
`cm3leon train` continues from there. prune and rollback do not ask first, and refuse while another
job trains there; after a job was killed on another host, they wait up to 90 s. --dry_run prints
what they would remove.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from absl import flags

from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json

if TYPE_CHECKING:
  from etils import epath


ACTIONS = ("list", "verify", "prune", "rollback")
_STEP = flags.DEFINE_string("step", None, "rollback: step to go back to, 1600 or 1,600.")
_KEEP_LAST = flags.DEFINE_integer(
  "keep_last", None, "prune: number of newest checkpoints to keep, at least 2.", lower_bound=2
)
_KEEP_EVERY = flags.DEFINE_integer(
  "keep_every", None, "prune: keep multiples of so many steps, too; 0: none.", lower_bound=0
)
_KEEP_BEST = flags.DEFINE_integer(
  "keep_best", None, "prune: keep so many of the lowest held-out loss, too.", lower_bound=0
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
  """Raises UserError if a flag is given that the action does not take."""
  for name, takers in TAKEN_BY.items():
    if flags.FLAGS[name].present and action not in takers:
      raise UserError(f"--{name} is given, but {action} does not take it: {_only(takers)}.")


def _only(actions: tuple[str, ...]) -> str:
  return f"only {' and '.join(actions)} {'does' if len(actions) == 1 else 'do'}"


def _step() -> int:
  """Returns the step of --step. Raises UserError if there is none, or it is no number."""
  if _STEP.value is None:
    raise UserError("rollback: name the step to go back to: --step=STEP; `list` shows them.")
  if not re.fullmatch(r"[0-9]{1,3}(,[0-9]{3}){1,4}|[0-9]{1,15}", _STEP.value):
    raise UserError(
      f"--step is '{_STEP.value}'; it must be the step of a checkpoint, such as 1600 or 1,600; "
      "`list` shows them."
    )
  return int(_STEP.value.replace(",", ""))


def _limits(folder: epath.Path) -> tuple[int, int, int]:
  """Returns what prune keeps: what flags say; without flags, what the run's config says."""
  given = (_KEEP_LAST.value, _KEEP_EVERY.value, _KEEP_BEST.value)
  if any(value is not None for value in given):
    if given[0] is None:
      raise UserError("prune: say how many of the newest are kept, too: --keep_last=2")
    return given[0], given[1] or 0, given[2] or 0
  config = read_json(folder / "config.json")["settings"]["train"]
  return config["keep_checkpoints"], config.get("keep_every", 0), config.get("keep_best", 0)


def _show(folder: epath.Path, check: bool) -> None:
  """Prints the list; with `check`, raises UserError if one is damaged or none is sealed."""
  from cm3leon_jax.training.saves import upkeep

  with upkeep.open_run(folder) as checkpoints:
    found = upkeep.entries(checkpoints)
    damages = upkeep.verify(checkpoints, found) if check else {}
  states = {step: "damaged" if damage else "whole" for step, damage in damages.items()}
  title = f"{folder}: {len(found)} checkpoint{'' if len(found) == 1 else 's'}"
  print("\n".join([title, *upkeep.table(found, states)]), flush=True)
  if check:
    upkeep.check_verified(folder, found, damages)


def main(action: str, workdir: epath.Path) -> None:
  from cm3leon_jax.training.saves import upkeep

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
