"""Orbax checkpoints of the state and the data position, with digests: Orbax restores a flipped bit without a word."""

import hashlib

from etils import epath
import jax
import orbax.checkpoint as ocp

from cm3leon_jax import stages
from cm3leon_jax.config import UserError
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training.state import TrainState

FOLDER = "checkpoints"


def _abstract(tree):
  """Typed arrays -> what Orbax restores onto, shardings on the current mesh included."""
  mesh = jax.sharding.get_mesh()
  place = lambda x: jax.sharding.NamedSharding(mesh, jax.typeof(x).sharding.spec)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), tree)


def _digests(folder: epath.Path) -> dict[str, str]:
  """SHA-256 of every file below `folder`, by relative path."""
  found = {}
  for path in folder.iterdir():  # Buckets have no recursive glob.
    if path.is_dir():
      found |= {f"{path.name}/{name}": digest for name, digest in _digests(path).items()}
    else:
      found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
  return found


class Checkpoints:
  """The checkpoints of one run; saving is asynchronous, a checkpoint counts once its digests are written."""

  def __init__(self, folder: epath.PathLike, keep: int):
    self.folder = epath.Path(folder).resolve() / FOLDER
    self._digest_folder = self.folder.parent / f"{FOLDER}.digests"
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._unsealed: int | None = None

  def discard_unsealed(self) -> None:
    """Deletes what a killed run left without digests, so that it cannot push sealed checkpoints out.

    Raises:
      UserError: there are checkpoints, and none of them is sealed.
    """
    steps = self._manager.all_steps()
    unsealed = [s for s in steps if not self._digest_path(s).exists()]
    if unsealed and len(unsealed) == len(steps) > 1:
      raise UserError(
        f"{self.folder} holds checkpoints and {self._digest_folder} no digests of them: restore those, or delete both."
      )
    for step in unsealed:
      self._manager.delete(step)

  def newest(self) -> int | None:
    """Step of the newest whole checkpoint, or None."""
    steps = [s for s in self._manager.all_steps() if self._digest_path(s).exists()]
    return max(steps, default=None)

  def save(self, state: TrainState, step: int, next_row: int) -> None:
    """Starts saving; seals the save before it."""
    self.wait()
    self._digest_path(step).unlink(missing_ok=True)
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"next_row": next_row}))
    self._manager.save(step, args=args, force=True)
    self._unsealed = step

  def wait(self) -> None:
    """Returns when every started save is whole on disk, with its digests."""
    self._manager.wait_until_finished()
    self.seal()

  def seal(self) -> None:
    """Writes the digests of the newest save if it is whole on disk by now; called every step, so that it counts soon."""
    if self._unsealed is None or self._manager.is_saving_in_progress():
      return
    if jax.process_index() == 0:
      stages.write_json(self._digest_path(self._unsealed), _digests(self.folder / str(self._unsealed)))
      kept = {str(s) for s in self._manager.all_steps()}
      for old in self._digest_folder.glob("*.json"):
        if old.stem not in kept:
          old.unlink()
    self._unsealed = None

  def restore(self, state: TrainState, step: int) -> tuple[TrainState, int]:
    """State and next row of the checkpoint of `step`. `state`: a state or its abstract types, on the current mesh.

    Raises:
      UserError: a file of the checkpoint is damaged or missing.
    """
    self.check(step)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(state)), data=ocp.args.JsonRestore())
    restored = self._manager.restore(step, args=args)
    return restored["state"], restored["data"]["next_row"]

  def restore_params(self, config: ModelConfig, step: int) -> dict:
    """Only the parameters, onto the current mesh."""
    self.check(step)
    params = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
    args = ocp.args.PyTreeRestore(
      item={"params": _abstract(params)},
      restore_args=ocp.checkpoint_utils.construct_restore_args({"params": _abstract(params)}),
      partial_restore=True,
    )
    return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]

  def check(self, step: int) -> None:
    """Raises UserError if a file of the checkpoint is not as it was written."""
    folder = self.folder / str(step)
    expected, found = stages.read_json(self._digest_path(step)), _digests(folder)
    for name in sorted({*expected, *found}):
      if expected.get(name) != found.get(name):
        raise UserError(
          f"{folder / name} is damaged: it is not what was written; delete {folder} to go back to the checkpoint before."
        )

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def _digest_path(self, step: int) -> epath.Path:
    return self._digest_folder / f"{step}.json"


def load_params(folder: epath.PathLike, config: ModelConfig) -> tuple[dict, int]:
  """Parameters of the newest checkpoint of the run in `folder`, on the current mesh, and their step.

  Raises:
    UserError: there is none, or it is damaged.
  """
  if not (epath.Path(folder) / FOLDER).exists():
    raise UserError(f"{folder} has no checkpoint: run `python -m launch.train` first.")
  checkpoints = Checkpoints(folder, keep=1_000_000)
  step = checkpoints.newest()
  if step is None:
    raise UserError(f"{folder} has no whole checkpoint yet: run `python -m launch.train` until it saves one.")
  params = checkpoints.restore_params(config, step)
  checkpoints.close()
  return params, step
