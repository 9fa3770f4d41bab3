"""Chooses the checkpoint from which training continues. All processes call these functions."""

from collections.abc import Sequence

from cm3leon_jax import distributed
from cm3leon_jax.errors import UserError
from cm3leon_jax.weights.checkpoint import Checkpoints


def discard_unsealed(checkpoints: Checkpoints) -> None:
  """Deletes the unsealed checkpoints of a killed run.

  Otherwise Orbax would count them among the newest checkpoints and delete sealed ones instead.

  If the run was killed before the digests of its first checkpoint were written, its only checkpoint
  is unsealed. This checkpoint is then sealed. It is complete, because Orbax lists only complete
  checkpoints.

  Raises:
    UserError: the folder has several checkpoints, and none of them is sealed.
  """
  folder, steps = checkpoints.folder, checkpoints.steps()
  sealed = checkpoints.sealed()
  # All processes list the checkpoints before any process deletes one. They all use the lists of
  # process 0.
  steps, unsealed = distributed.gather([steps, [s for s in steps if s not in sealed]])[0]
  if unsealed and len(unsealed) == len(steps) > 1:
    raise UserError(
      f"{folder} contains checkpoints, but {checkpoints.digest_folder} does not contain their "
      "digests: restore the digests, or delete both folders."
    )
  if unsealed == steps and steps:
    distributed.print_once(
      f"warning: checkpoint {steps[0]} in {folder} is complete but has no digests; they are now "
      "written."
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
  """Returns the step of the newest sealed checkpoint whose files match their digests, or None.

  It warns about newer checkpoints that are damaged or missing, and deletes the damaged ones. The
  run then computes the steps up to these checkpoints again.

  Raises:
    UserError: all sealed checkpoints are damaged.
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
      f"all checkpoints in {checkpoints.folder} are damaged ({'; '.join(damaged.values())}): "
      "restore one of them, or use another --workdir."
    )
  return None


def _warn_of_gone(checkpoints: Checkpoints, sealed: list[int]) -> None:
  """Warns about checkpoints newer than all of `sealed` of which only the digests are left."""
  steps = [int(p.stem) for p in checkpoints.digest_folder.glob("*.json") if p.stem.isdecimal()]
  for step in sorted(s for s in steps if sealed and s > sealed[-1]):
    distributed.print_once(
      f"warning: checkpoint {step} is gone from {checkpoints.folder}, but its digests remain; the "
      "run goes back to an earlier checkpoint."
    )


def check_target(checkpoints: Checkpoints, step: int) -> None:
  """Checks that a run can go back to a step.

  Raises:
    UserError: the checkpoint of that step is absent, not sealed, or damaged.
  """
  sealed = distributed.gather(checkpoints.sealed())[0]
  if step not in sealed:
    raise UserError(
      f"{checkpoints.folder} has no sealed checkpoint of step {step}; it has {listed(sealed)}."
    )
  if damage := checkpoints.damage(step):
    raise UserError(f"{damage}: go back to another step of {listed(sealed)}.")


def listed(steps: Sequence[int]) -> str:
  """Formats steps, e.g. "1596, 1600"."""
  return ", ".join(map(str, steps))
