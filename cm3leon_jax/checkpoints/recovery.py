"""Which checkpoint a training continues from; all processes of a run call these functions."""

from collections.abc import Sequence

from cm3leon_jax import distributed
from cm3leon_jax.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.config import UserError


def discard_unsealed(checkpoints: Checkpoints) -> None:
  """Deletes checkpoints that a killed run left unsealed, so that they displace no sealed ones.

  A run that was killed between its first save and the digests has one checkpoint, unsealed. Orbax
  reports it as complete, so it gets its digests now.

  Raises:
    UserError: there are several checkpoints, and none of them is sealed.
  """
  folder, steps = checkpoints.folder, checkpoints.steps()
  sealed = checkpoints.sealed()
  # All processes list before one deletes, and all use the first one's lists.
  steps, unsealed = distributed.gather([steps, [s for s in steps if s not in sealed]])[0]
  if unsealed and len(unsealed) == len(steps) > 1:
    raise UserError(
      f"{folder} holds checkpoints, but {checkpoints.digest_folder} holds no digests of them: "
      "restore the digests, or delete both folders."
    )
  if unsealed == steps and steps:
    distributed.print_once(
      f"warning: checkpoint {steps[0]} in {folder} has no digests; it is complete, so it gets them."
    )
    checkpoints.seal(steps[0])
    return
  for step in unsealed:
    distributed.print_once(
      f"warning: checkpoint {step} in {folder} has no digests: its save was not finished, and it "
      "is deleted."
    )
    checkpoints.delete(step)


def newest_whole(checkpoints: Checkpoints) -> int | None:
  """Returns the step of the newest sealed checkpoint that is whole, or None if there is none.

  Newer ones that are damaged are named in a warning and deleted, newer ones that are gone are
  named: their steps are trained again.

  Raises:
    UserError: all checkpoints are damaged.
  """
  sealed = checkpoints.sealed()
  _warn_of_gone(checkpoints, sealed)
  damaged: dict[int, str] = {}
  for step in reversed(distributed.gather(sealed)[0]):
    damage = checkpoints.damage(step)
    if damage is None:
      for newer, sentence in damaged.items():
        distributed.print_once(f"warning: {sentence}; the run goes back to checkpoint {step}.")
        checkpoints.delete(newer)
      return step
    damaged[step] = damage
  if damaged:
    raise UserError(
      f"no checkpoint in {checkpoints.folder} is whole ({'; '.join(damaged.values())}): restore "
      "one of them, or use another --workdir."
    )
  return None


def _warn_of_gone(checkpoints: Checkpoints, sealed: list[int]) -> None:
  """Prints which checkpoints newer than all of `sealed`, if any, have left only their digests."""
  steps = [int(p.stem) for p in checkpoints.digest_folder.glob("*.json") if p.stem.isdecimal()]
  for step in sorted(s for s in steps if sealed and s > sealed[-1]):
    distributed.print_once(
      f"warning: checkpoint {step} is gone from {checkpoints.folder}, its digests are not; the run "
      "goes back to one before."
    )


def check_target(checkpoints: Checkpoints, step: int) -> None:
  """Checks that a run can go back to a step.

  Raises:
    UserError: its checkpoint is absent, not sealed, or damaged.
  """
  steps, sealed = distributed.gather([checkpoints.steps(), checkpoints.sealed()])[0]
  if step not in sealed:
    state = f"{step:,} is there but not sealed; " if step in steps else ""
    raise UserError(
      f"{checkpoints.folder} has no sealed checkpoint of step {step:,}: {state}it has "
      f"{listed(sealed) or 'none'}."
    )
  if damage := checkpoints.damage(step):
    others = listed([s for s in sealed if s != step])
    remedy = f"go back to another step: {others}" if others else "it is the only one: restore it"
    raise UserError(f"{damage}; {remedy}.")


def go_back(checkpoints: Checkpoints, step: int) -> None:
  """Deletes all checkpoints after that of `step`. Raises UserError, see `check_target`."""
  check_target(checkpoints, step)
  checkpoints.delete_after(step)


def listed(steps: Sequence[int]) -> str:
  """Formats steps: 1,596, 1,600."""
  return ", ".join(f"{step:,}" for step in steps)
