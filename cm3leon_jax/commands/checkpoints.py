"""Lists, verifies and rolls back the checkpoints of a run; needs no config.

  cm3leon checkpoints list --workdir=workdir/scenes
  cm3leon checkpoints verify --workdir=workdir/scenes
  cm3leon checkpoints rollback --workdir=workdir/scenes --step=800

list: prints the step, time, size and held-out losses of each checkpoint, and whether it is sealed.
verify: reads all files and compares them with their digests.
rollback: removes the checkpoints after --step and the later lines of metrics.jsonl, so that
`cm3leon train` continues from --step. With --skip_rows=4000:4799 it continues without these rows,
for example the rows of skipped steps.
It does not ask for confirmation, fails while another job trains in the workdir, and waits up to
90 s if a job was killed on another host.
"""

from __future__ import annotations

import dataclasses

from etils import epath, epy
from pydantic import PositiveInt

from cm3leon_jax.commands import common, flag
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax.data.rows import skipped_rows
  from cm3leon_jax.training.saves import upkeep

ACTIONS = ("list", "verify", "rollback")


@dataclasses.dataclass(frozen=True)
class Flags(flag.Fields):
  step: PositiveInt | None = None
  """rollback: step to return to."""
  skip_rows: str = ""
  """rollback: first and last row that the run then leaves out, e.g. 4000:4799."""

  def check_action(self, action: str) -> None:
    """Raises UserError if a flag of `rollback` is given to another action."""
    given = [name for name, value in vars(self).items() if value]
    if given and action != "rollback":
      raise UserError(f"--{given[0]} is given, but {action} does not take it: only rollback does.")


def _show(folder: epath.Path, check: bool) -> None:
  """Prints the checkpoints. If `check`, raises UserError if one is damaged or none is sealed."""
  with upkeep.open_run(folder) as checkpoints:
    result = upkeep.entries(checkpoints)
    damages = upkeep.verify(checkpoints, result) if check else {}
  states = {step: "damaged" if damage else "whole" for step, damage in damages.items()}
  title = f"{folder}: {len(result)} checkpoint{'' if len(result) == 1 else 's'}"
  print("\n".join([title, *upkeep.table(result, states)]), flush=True)
  if check:
    upkeep.check_verified(folder, result, damages)


def main(action: str, workdir: epath.Path, flags: Flags) -> None:
  flags.check_action(action)
  skip_rows = skipped_rows.parse(flags.skip_rows)
  folder = workdir / "train"
  upkeep.require(folder)
  if action != "rollback":
    _show(folder, check=action == "verify")
  elif flags.step is None:
    raise UserError("rollback needs the step to return to: give --step=STEP; `list` shows them.")
  else:
    print("\n".join(upkeep.rollback(folder, flags.step, skip_rows)))


if __name__ == "__main__":
  common.run(main, Flags, config=False, actions=ACTIONS)
