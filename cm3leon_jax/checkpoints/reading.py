"""Finds a run's checkpoints and loads their parameters, for commands that do not train."""

from etils import epath
import jax

from cm3leon_jax.checkpoints import sealing
from cm3leon_jax.checkpoints.checkpoint import FOLDER, Checkpoints
from cm3leon_jax.config import UserError
from cm3leon_jax.models import adapters, transformer
from cm3leon_jax.models.config import AdapterConfig, ModelConfig
from cm3leon_jax.weights import stored


def newest_step(folder: epath.PathLike) -> int:
  """Returns the step of a run's newest sealed checkpoint, or 0. It reads only file names."""
  digests = (epath.Path(folder) / f"{FOLDER}.digests").glob("*.json")
  return max((int(path.stem) for path in digests if path.stem.isdecimal()), default=0)


def any_in(folder: epath.PathLike) -> bool:
  """Returns whether a run has a checkpoint, sealed or not. It reads only file names.

  Raises:
    TryAgain: the folder could not be read.
  """
  return bool(sealing.steps_in(epath.Path(folder) / FOLDER)) or newest_step(folder) > 0


def load_params(
  folder: epath.PathLike,
  config: ModelConfig,
  step: int | None = None,
  average: bool = True,
  adapter: AdapterConfig | None = None,
) -> tuple[dict, int]:
  """Loads a checkpoint's parameters onto the current mesh. Returns them and the step.

  If the run has a moving average of the parameters, the average is loaded.

  Args:
    step: step of the checkpoint; None: the newest sealed checkpoint or, with `train.patience`, the
      one with the lowest held-out loss.
    average: whether to load the average, if the run has one; False: the last parameters.
    adapter: the adapters that the run trained. If given, only they are loaded.

  Raises:
    UserError: the run has no sealed checkpoint, or no checkpoint of `step`, or the checkpoint is
      damaged, or `average` is False and the run has no average.
  """
  checkpoints, step = _open(folder, step)
  key = jax.random.key(0)
  types = jax.eval_shape(
    lambda: adapters.init(config, adapter, key) if adapter else transformer.init_params(config, key)
  )
  params = checkpoints.restore_params(types, step, average)
  checkpoints.close()
  return params, step


def open_params(
  folder: epath.PathLike, step: int | None = None, average: bool | None = None
) -> stored.StoredParams:
  """Opens the parameters of a run's checkpoint for reading in slices; see `stored.open_state`."""
  checkpoints, step = _open(folder, step)
  checkpoints.check(step)
  checkpoints.close()
  return stored.open_state(checkpoints.folder / str(step) / "state", average)


def identify(folder: epath.PathLike, step: int | None = None) -> tuple[int, str | None]:
  """Returns the step of a run's checkpoint and the SHA-256 of its digest file.

  `step` is as in `load_params`.
  """
  checkpoints, step = _open(folder, step)
  checkpoints.close()
  return step, checkpoints.digest(step)


def next_row(folder: epath.PathLike, step: int) -> int:
  """Returns the position in the data at which training continues from a run's checkpoint.

  It raises the same errors as `load_params`.
  """
  checkpoints, step = _open(folder, step)
  checkpoints.check(step)
  row = checkpoints.next_row(step)
  checkpoints.close()
  return row


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
    best = checkpoints.best(newest)
    step = best[0] if best else newest
  if not (checkpoints.folder / str(step)).exists():
    raise UserError(f"{folder} has no checkpoint of step {step}: the newest is {newest}.")
  return checkpoints, step
