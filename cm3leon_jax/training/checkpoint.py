"""Orbax checkpoints of the state and the data position, with digests: Orbax checks no contents."""

from collections.abc import Callable
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from cm3leon_jax import distributed
from cm3leon_jax.config import UserError
from cm3leon_jax.io import digest, read_json, write_json
from cm3leon_jax.mesh import abstract
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig

FOLDER = "checkpoints"


def _files(folder: epath.Path) -> list[str]:
  """Returns the relative paths of all files below `folder`, sorted."""
  files = []
  for path in folder.iterdir():  # Buckets have no recursive glob.
    files += [f"{path.name}/{name}" for name in _files(path)] if path.is_dir() else [path.name]
  return sorted(files)


def _share(names: list[str]) -> list[str]:
  """Returns the names of the files that this process digests or checks."""
  return names[jax.process_index() :: jax.process_count()]


def _damage(folder: epath.Path, expected: dict) -> str | None:
  """Says which file of this process's share is not as its digest says, or None."""
  name = ""
  try:
    for name in _share(sorted({*expected, *_files(folder)})):
      if expected.get(name) != digest(folder / name):
        return f"{folder / name} is damaged: it is not what was written"
  except OSError as error:
    return f"{folder / name} cannot be read ({error})"
  return None


class Checkpoints:
  """The checkpoints of one run. Saving is asynchronous; a checkpoint counts once it has digests.

  All processes of a run call the same methods in the same order. When Orbax reports a checkpoint as
  complete, each process writes the digests of its share of the files to STEP.partI; the first
  process merges them to STEP.json, which seals the checkpoint.
  """

  def __init__(self, folder: epath.PathLike, keep: int):
    self.folder = epath.Path(folder).resolve() / FOLDER
    self._digest_folder = self.folder.parent / f"{FOLDER}.digests"
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._unsealed: int | None = None
    self._digested = False

  def discard_unsealed(self) -> None:
    """Deletes checkpoints that a killed run left unsealed, so that they displace no sealed ones.

    A run that was killed between its first save and the digests has one checkpoint, unsealed. Orbax
    reports it as complete, so it gets its digests now.

    Raises:
      UserError: there are several checkpoints, and none of them is sealed.
    """
    steps = list(self._manager.all_steps())
    unsealed = [s for s in steps if not self._digest_path(s).exists()]
    # All processes list before one deletes, and all use the first one's lists.
    steps, unsealed = distributed.gather([steps, unsealed])[0]
    if unsealed and len(unsealed) == len(steps) > 1:
      raise UserError(
        f"{self.folder} holds checkpoints, but {self._digest_folder} holds no digests of them: "
        "restore the digests, or delete both folders."
      )
    if unsealed == steps and steps:
      [self._unsealed] = steps
      distributed.print_once(
        f"warning: checkpoint {self._unsealed} in {self.folder} has no digests; it is complete, "
        "so it gets them."
      )
      self.wait()
      return
    for step in unsealed:
      distributed.print_once(
        f"warning: checkpoint {step} in {self.folder} has no digests: its save was not finished, "
        "and it is deleted."
      )
      self._manager.delete(step)

  def newest(self) -> int | None:
    """Returns the step of the newest sealed checkpoint, or None."""
    steps = [s for s in self._manager.all_steps() if self._digest_path(s).exists()]
    return distributed.gather(max(steps, default=None))[0]

  def newest_whole(self) -> int | None:
    """Returns the step of the newest sealed checkpoint that is whole, or None if there is none.

    Newer ones that are damaged are named in a warning and deleted, newer ones that are gone are
    named: their steps are trained again.

    Raises:
      UserError: all checkpoints are damaged.
    """
    sealed = sorted(s for s in self._manager.all_steps() if self._digest_path(s).exists())
    self._warn_of_gone(sealed)
    damaged: dict[int, str] = {}
    for step in reversed(distributed.gather(sealed)[0]):
      damage = self.damage(step)
      if damage is None:
        for newer, sentence in damaged.items():
          distributed.print_once(f"warning: {sentence}; the run goes back to checkpoint {step}.")
          self._manager.delete(newer)
        if distributed.is_first():
          self._remove_digests(lambda s: s in damaged)
        return step
      damaged[step] = damage
    if damaged:
      raise UserError(
        f"no checkpoint in {self.folder} is whole ({'; '.join(damaged.values())}): restore one of "
        "them, or use another --workdir."
      )
    return None

  def _warn_of_gone(self, sealed: list[int]) -> None:
    """Prints which checkpoints newer than all of `sealed`, if any, have left only their digests."""
    steps = [int(p.stem) for p in self._digest_folder.glob("*.json") if p.stem.isdecimal()]
    for step in sorted(s for s in steps if sealed and s > sealed[-1]):
      distributed.print_once(
        f"warning: checkpoint {step} is gone from {self.folder}, its digests are not; the run goes "
        "back to one before."
      )

  def save(self, state, step: int, next_row: int) -> None:
    """Seals the previous save and starts to save `state`, a tree of arrays."""
    self.wait()
    # A killed run may have left digests. Orbax starts to write when all processes are here.
    if distributed.is_first():
      self._remove_digests(lambda s: s == step)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"next_row": next_row})
    )
    self._manager.save(step, args=args, force=True)
    self._unsealed, self._digested = step, False

  def wait(self) -> None:
    """Returns when every started save is complete on disk, with its digests."""
    self._manager.wait_until_finished()
    with distributed.together():
      self._digest_share()
    self.seal()

  def seal(self) -> None:
    """Seals the newest save if it is complete on disk; called after every step."""
    self._digest_share()
    if not self._digested or self._unsealed is None:
      return
    step = self._unsealed
    if distributed.is_first():
      parts = [self._digest_folder / f"{step}.part{i}" for i in range(jax.process_count())]
      if not {part.name for part in parts} <= {path.name for path in self._digest_folder.iterdir()}:
        return
      digests = {name: value for part in parts for name, value in read_json(part).items()}
      write_json(self._digest_path(step), digests)
      for part in parts:
        part.unlink()
      kept = set(self._manager.all_steps())
      self._remove_digests(lambda s: s not in kept)
    self._unsealed = None

  def _digest_share(self) -> None:
    """Digests this process's share of the newest save, once, if the save is complete on disk."""
    if self._unsealed is None or self._digested or self._manager.is_saving_in_progress():
      return
    folder = self.folder / str(self._unsealed)
    part = self._digest_folder / f"{self._unsealed}.part{jax.process_index()}"
    write_json(part, {name: digest(folder / name) for name in _share(_files(folder))})
    self._digested = True

  def _remove_digests(self, of: Callable[[int], bool]) -> None:
    """Deletes the digests, merged or not, of all steps for which `of` is true."""
    for path in self._digest_folder.glob("*"):
      step = path.name.partition(".")[0]
      if step.isdecimal() and of(int(step)):  # Other files may be the disk's own.
        path.unlink()

  def restore(self, state, step: int, checked: bool = False) -> tuple[Any, int]:
    """Restores the state and the next row of a checkpoint.

    Args:
      state: a state or its types, on the current mesh.
      step: of the checkpoint.
      checked: whether its files were compared with their digests before.

    Raises:
      UserError: a file of the checkpoint is damaged or missing.
    """
    if not checked:
      self.check(step)
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract(state, jax.sharding.get_mesh())),
      data=ocp.args.JsonRestore(),
    )
    restored = self._manager.restore(step, args=args)
    return restored["state"], restored["data"]["next_row"]

  def restore_params(self, config: ModelConfig, step: int, average: bool = True) -> dict:
    """Restores only the parameters, onto the current mesh; see `load_params`."""
    self.check(step)
    params = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
    stored = ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / "state")
    if not average and not stored.get("ema"):
      raise UserError(
        f"checkpoint {step} in {self.folder.parent} has no average of the parameters "
        "(config.optimizer.ema_decay), so its last parameters are the only ones."
      )
    name = "ema" if average and stored.get("ema") else "params"
    item = {name: abstract(params, jax.sharding.get_mesh())}
    args = ocp.args.PyTreeRestore(
      item=item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    )
    return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"][name]

  def check(self, step: int) -> None:
    """Raises UserError if a file of the checkpoint differs from what was written."""
    if damage := self.damage(step):
      raise UserError(f"{damage}; delete {self.folder / str(step)} to go back to the previous one.")

  def damage(self, step: int) -> str | None:
    """Says which file of a checkpoint differs from what was written; None: all are as written."""
    folder, damage = self.folder / str(step), None
    with distributed.together():
      try:
        expected = read_json(self._digest_path(step))
      except UserError:
        expected = None
      if not isinstance(expected, dict) or not expected:
        damage = f"{self._digest_path(step)} is damaged: it has no digests"
      else:
        damage = _damage(folder, expected)
    return next(filter(None, distributed.gather(damage)), None)

  def digest(self, step: int) -> str | None:
    """Returns the SHA-256 of the digests of a checkpoint's files."""
    return digest(self._digest_path(step))

  def close(self) -> None:
    """Waits for the last save and ends."""
    self.wait()
    self._manager.close()

  def _digest_path(self, step: int) -> epath.Path:
    return self._digest_folder / f"{step}.json"


def load_params(
  folder: epath.PathLike, config: ModelConfig, step: int | None = None, average: bool = True
) -> tuple[dict, int]:
  """Loads the parameters of a run's checkpoint onto the current mesh: their average, if it has one.

  Args:
    folder: of the run.
    config: size of the decoder.
    step: of the checkpoint; default: the newest.
    average: False loads the last parameters of a run that has an average.

  Returns:
    The parameters and their step.

  Raises:
    UserError: there is no sealed checkpoint, or none of `step`, or it is damaged; or `average` is
      False and the run has none.
  """
  checkpoints, step = _open(folder, step)
  params = checkpoints.restore_params(config, step, average)
  checkpoints.close()
  return params, step


def identify(folder: epath.PathLike, step: int | None = None) -> tuple[int, str | None]:
  """Returns the step of a run's checkpoint and the SHA-256 of the digests of its files.

  Arguments and errors are those of `load_params`.
  """
  checkpoints, step = _open(folder, step)
  checkpoints.close()
  return step, checkpoints.digest(step)


def _open(folder: epath.PathLike, step: int | None) -> tuple[Checkpoints, int]:
  """Opens a run's checkpoints; returns them and a step that they have, the newest for None."""
  if not (epath.Path(folder) / FOLDER).exists():
    raise UserError(f"{folder} has no checkpoint: run `python -m launch.train` first.")
  checkpoints = Checkpoints(folder, keep=1_000_000)
  newest = checkpoints.newest()
  if newest is None:
    raise UserError(
      f"{folder} has no complete checkpoint yet: run `python -m launch.train` until it saves one."
    )
  step = newest if step is None else step
  if not (checkpoints.folder / str(step)).exists():
    raise UserError(f"{folder} has no checkpoint of step {step} any more: the newest is {newest}.")
  return checkpoints, step
