"""Finds a run's checkpoints and loads their parameters, for commands that do not train."""

from collections.abc import Callable
import sys
from typing import TypeVar

from etils import epath
import jax

from cm3leon_jax import distributed
from cm3leon_jax.config.groups import Tuned
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.models import groups
from cm3leon_jax.stages import stages
from cm3leon_jax.weights import sealing, stored
from cm3leon_jax.weights.checkpoint import FOLDER, Checkpoints

TRIES = 10  # Number of times that the newest checkpoint is chosen, if a training deletes it.
T = TypeVar("T")


def any_in(folder: epath.PathLike) -> bool:
  """Returns whether a run has a checkpoint, sealed or not. It reads only file names.

  Raises:
    TryAgain: the folder could not be read.
  """
  return bool(sealing.steps_in(epath.Path(folder) / FOLDER)) or stages.newest_step(folder) > 0


def load_params(
  folder: epath.PathLike,
  config: ModelConfig,
  step: int | None = None,
  average: bool = True,
  tuned: Tuned | None = None,
) -> tuple[dict, int]:
  """Loads a checkpoint's parameters onto the current mesh. Returns them and the step.

  If the run has a moving average of the parameters, the average is loaded.

  Args:
    step: step of the checkpoint; None: the newest sealed checkpoint or, with `train.patience`, the
      one with the lowest held-out loss.
    average: whether to load the average, if the run has one; False: the last parameters.
    tuned: what the run trained, and its checkpoints contain; None: all parameters.

  Raises:
    UserError: the run has no sealed checkpoint, or no checkpoint of `step`, or the checkpoint is
      damaged, or `average` is False and the run has no average.
  """
  key = jax.random.key(0)
  types = jax.eval_shape(lambda: groups.init(config, tuned, key))
  return _read(folder, step, lambda found, step: found.restore_params(types, step, average))


def open_params(
  folder: epath.PathLike, step: int | None = None, average: bool | None = None
) -> stored.StoredParams:
  """Opens the parameters of a run's checkpoint for reading in slices; see `stored.open_state`."""
  return _read(
    folder, step, lambda found, step: stored.open_state(found.folder / str(step) / "state", average)
  )[0]


def identify(folder: epath.PathLike, step: int | None = None) -> tuple[int, str | None]:
  """Returns the step of a run's checkpoint and the SHA-256 of its digest file.

  `step` is as in `load_params`.
  """
  checkpoints, step = _open(folder, step)
  checkpoints.close()
  return step, checkpoints.digest(step)


def used_step(folder: epath.PathLike) -> int | None:
  """Returns the step whose parameters are a run's result so far; None without a checkpoint."""
  if not (epath.Path(folder) / FOLDER).exists():
    return None
  with Checkpoints(folder, keep=1_000_000) as checkpoints:
    newest = checkpoints.newest()
    return newest and _used(checkpoints, newest)


def next_row(folder: epath.PathLike) -> int:
  """Returns the first row that a run has not read at its newest checkpoint; 0 without one."""
  if not (epath.Path(folder) / FOLDER).exists():
    return 0
  with Checkpoints(folder, keep=1_000_000) as checkpoints:
    newest = checkpoints.newest()
    return 0 if newest is None else checkpoints.next_row(newest)


def _used(checkpoints: Checkpoints, newest: int) -> int:
  best = checkpoints.best(newest)
  return best[0] if best else newest


def _read(
  folder: epath.PathLike, step: int | None, read: Callable[[Checkpoints, int], T]
) -> tuple[T, int]:
  """Verifies a checkpoint, and returns the result of `read` and its step.

  A running training may delete the newest checkpoint before it is read: then chooses again.
  """
  tries = 1 if step is not None or distributed.are_several() else TRIES
  while True:
    newest, tries = stages.newest_step(folder), tries - 1
    try:
      checkpoints, chosen = _open(folder, step)
      checkpoints.check(chosen)
      result = read(checkpoints, chosen)
      checkpoints.close()
      break
    except Exception:
      if not tries or stages.newest_step(folder) == newest:
        raise
  if step is None and not (epath.Path(folder) / stages.DONE).exists() and distributed.is_first():
    kind = "newest" if chosen == newest else "best"
    line = f"{folder}: the training is not finished; its {kind} checkpoint, step {chosen}, is used."
    print(line, file=sys.stderr, flush=True)
  return result, chosen


def _open(folder: epath.PathLike, step: int | None) -> tuple[Checkpoints, int]:
  """Opens a run's checkpoints. Returns them and `step`; None becomes the step of the result."""
  if not (epath.Path(folder) / FOLDER).exists():
    raise UserError(f"{folder} has no checkpoint: run `cm3leon train` first.")
  checkpoints = Checkpoints(folder, keep=1_000_000)
  newest = checkpoints.newest()
  if newest is None:
    raise UserError(
      f"{folder} has no complete checkpoint yet: run `cm3leon train` until it saves one."
    )
  if step is None:
    step = _used(checkpoints, newest)
  if not (checkpoints.folder / str(step)).exists():
    raise UserError(f"{folder} has no checkpoint of step {step}: the newest is {newest}.")
  return checkpoints, step
