"""Orbax checkpoints of the state and the data position, with digests: Orbax restores a flipped bit without a word."""

from etils import epath
import jax
import orbax.checkpoint as ocp

from cm3leon_jax import distributed
from cm3leon_jax.config import UserError
from cm3leon_jax.io import digest, read_json, write_json
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training.state import TrainState

FOLDER = "checkpoints"


def _abstract(tree):
  """Typed arrays -> what Orbax restores onto, shardings on the current mesh included."""
  mesh = jax.sharding.get_mesh()
  place = lambda x: jax.sharding.NamedSharding(mesh, jax.typeof(x).sharding.spec)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), tree)


def _files(folder: epath.Path) -> list[str]:
  """Relative paths of all files below `folder`, sorted."""
  found = []
  for path in folder.iterdir():  # Buckets have no recursive glob.
    found += [f"{path.name}/{name}" for name in _files(path)] if path.is_dir() else [path.name]
  return sorted(found)


def _share(names: list[str]) -> list[str]:
  """Those of the names that this process takes care of."""
  return names[jax.process_index() :: jax.process_count()]


class Checkpoints:
  """The checkpoints of one run; saving is asynchronous, a checkpoint counts once its digests are written.

  All processes of a run call the same methods in the same order. Each digests its share of a checkpoint's files into
  STEP.partI, when Orbax has told all of them that the checkpoint is whole; the first puts the parts together as STEP.json.
  """

  def __init__(self, folder: epath.PathLike, keep: int):
    self.folder = epath.Path(folder).resolve() / FOLDER
    self._digest_folder = self.folder.parent / f"{FOLDER}.digests"
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._unsealed: int | None = None
    self._digested = False

  def discard_unsealed(self) -> None:
    """Deletes what a killed run left without digests, so that it cannot push sealed checkpoints out.

    Raises:
      UserError: there are checkpoints, and none of them is sealed.
    """
    steps = list(self._manager.all_steps())
    found = [steps, [s for s in steps if not self._digest_path(s).exists()]]
    steps, unsealed = distributed.gather(found)[
      0
    ]  # All have looked before one deletes, and all do what the first found.
    if unsealed and len(unsealed) == len(steps) > 1:
      raise UserError(
        f"{self.folder} holds checkpoints and {self._digest_folder} no digests of them: restore those, or delete both."
      )
    for step in unsealed:
      self._manager.delete(step)

  def newest(self) -> int | None:
    """Step of the newest whole checkpoint, or None."""
    steps = [s for s in self._manager.all_steps() if self._digest_path(s).exists()]
    return distributed.gather(max(steps, default=None))[0]

  def save(self, state: TrainState, step: int, next_row: int) -> None:
    """Starts saving; seals the save before it."""
    self.wait()
    if (
      distributed.is_first()
    ):  # A killed run may have left some; Orbax starts to write when all have come here.
      self._remove_digests(lambda s: s == step)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"next_row": next_row})
    )
    self._manager.save(step, args=args, force=True)
    self._unsealed, self._digested = step, False

  def wait(self) -> None:
    """Returns when every started save is whole on disk, with its digests."""
    self._manager.wait_until_finished()
    with distributed.together():
      self._digest_share()
    self.seal()

  def seal(self) -> None:
    """Writes the digests of the newest save if it is whole on disk by now; called every step, so that it counts soon."""
    self._digest_share()
    if not self._digested or self._unsealed is None:
      return
    step = self._unsealed
    if distributed.is_first():
      parts = [self._digest_folder / f"{step}.part{i}" for i in range(jax.process_count())]
      if not {part.name for part in parts} <= {path.name for path in self._digest_folder.iterdir()}:
        return
      write_json(
        self._digest_path(step), {k: v for part in parts for k, v in read_json(part).items()}
      )
      for part in parts:
        part.unlink()
      kept = set(self._manager.all_steps())
      self._remove_digests(lambda s: s not in kept)
    self._unsealed = None

  def _digest_share(self) -> None:
    """Digests this process's files of the newest save, once, if the save is whole on disk by now."""
    if self._unsealed is None or self._digested or self._manager.is_saving_in_progress():
      return
    folder, part = (
      self.folder / str(self._unsealed),
      self._digest_folder / f"{self._unsealed}.part{jax.process_index()}",
    )
    write_json(part, {name: digest(folder / name) for name in _share(_files(folder))})
    self._digested = True

  def _remove_digests(self, of) -> None:
    """Deletes the digests, whole and in parts, of all steps for which `of` is true."""
    for path in self._digest_folder.glob("*"):
      if of(int(path.name.partition(".")[0])):
        path.unlink()

  def restore(self, state: TrainState, step: int) -> tuple[TrainState, int]:
    """State and next row of the checkpoint of `step`. `state`: a state or its abstract types, on the current mesh.

    Raises:
      UserError: a file of the checkpoint is damaged or missing.
    """
    self.check(step)
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(_abstract(state)), data=ocp.args.JsonRestore()
    )
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
    with distributed.together():
      expected = read_json(self._digest_path(step))
      for name in _share(sorted({*expected, *_files(folder)})):
        if expected.get(name) != digest(folder / name):
          raise UserError(
            f"{folder / name} is damaged: it is not what was written; delete {folder} to go back to the checkpoint before."
          )

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def _digest_path(self, step: int) -> epath.Path:
    return self._digest_folder / f"{step}.json"


def load_params(
  folder: epath.PathLike, config: ModelConfig, step: int | None = None
) -> tuple[dict, int]:
  """Parameters of the checkpoint of `step` in `folder`, on the current mesh, and their step.

  Without a step, the newest checkpoint.

  Raises:
    UserError: there is none, or none of `step`, or it is damaged.
  """
  if not (epath.Path(folder) / FOLDER).exists():
    raise UserError(f"{folder} has no checkpoint: run `python -m launch.train` first.")
  checkpoints = Checkpoints(folder, keep=1_000_000)
  newest = checkpoints.newest()
  if newest is None:
    raise UserError(
      f"{folder} has no whole checkpoint yet: run `python -m launch.train` until it saves one."
    )
  step = newest if step is None else step
  if not (checkpoints.folder / str(step)).exists():
    raise UserError(f"{folder} has no checkpoint of step {step} any more: the newest is {newest}.")
  params = checkpoints.restore_params(config, step)
  checkpoints.close()
  return params, step
