"""Lists, verifies and removes the checkpoints of a run; it needs no config.

  python -m launch.checkpoints list --workdir=workdir/scenes
  python -m launch.checkpoints verify --workdir=workdir/scenes
  python -m launch.checkpoints prune --workdir=workdir/scenes --keep_last=2 --keep_every=1000
  python -m launch.checkpoints rollback --workdir=workdir/scenes --step=800

list: step, time, size, whether it is sealed, held-out losses. verify: reads all files, and compares
them with their digests. prune: removes those that no flag keeps; without flags, the run's config
counts. rollback: removes the checkpoints after --step, and what metrics.jsonl has after it, so that
launch.train continues from there. Neither asks; both refuse while a job trains in the workdir.
"""

from absl import flags

from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json

ACTIONS = ("list", "verify", "prune", "rollback")
_STEP = flags.DEFINE_integer("step", None, "rollback: step to go back to.", lower_bound=0)
_KEEP_LAST = flags.DEFINE_integer(
  "keep_last", None, "prune: number of newest checkpoints to keep.", lower_bound=1
)
_KEEP_EVERY = flags.DEFINE_integer(
  "keep_every", None, "prune: keep multiples of so many steps, too; 0: none.", lower_bound=0
)
_KEEP_BEST = flags.DEFINE_integer(
  "keep_best", None, "prune: keep so many of the lowest held-out loss, too.", lower_bound=0
)


def _limits(folder) -> tuple[int, int, int]:
  """Returns what prune keeps: what flags say; without flags, what the run's config says."""
  given = (_KEEP_LAST.value, _KEEP_EVERY.value, _KEEP_BEST.value)
  if any(value is not None for value in given):
    if given[0] is None:
      raise UserError("prune: say how many of the newest are kept, too: --keep_last=2")
    return given[0], given[1] or 0, given[2] or 0
  config = read_json(folder / "config.json")["settings"]["train"]
  return config["keep_checkpoints"], config.get("keep_every", 0), config.get("keep_best", 0)


def _show(folder, check: bool) -> None:
  """Prints the list; with `check`, raises UserError if a checkpoint is damaged."""
  from cm3leon_jax.training import upkeep

  with upkeep.open_run(folder) as checkpoints:
    found = upkeep.entries(checkpoints)
    damages = upkeep.verify(checkpoints, found) if check else {}
  states = {step: "damaged" if damage else "whole" for step, damage in damages.items()}
  print("\n".join([f"{folder}: {len(found)} checkpoints", *upkeep.table(found, states)]))
  if damaged := [damage for damage in damages.values() if damage]:
    raise UserError(
      f"{len(damaged)} of {len(damages)} sealed checkpoints are damaged ({'; '.join(damaged)}): "
      "launch.train goes back to the newest whole one by itself."
    )


def main(action: str, workdir) -> None:
  from cm3leon_jax.training import upkeep

  folder = workdir / "train"
  if action in ("list", "verify"):
    _show(folder, check=action == "verify")
    return
  if action == "prune":
    sentences = upkeep.prune(folder, *_limits(folder))
  else:
    if _STEP.value is None:
      raise UserError("rollback: name the step to go back to: --step=STEP; `list` shows them.")
    sentences = upkeep.rollback(folder, _STEP.value)
  print("\n".join(sentences))


if __name__ == "__main__":
  common.run(main, config=False, actions=ACTIONS)
