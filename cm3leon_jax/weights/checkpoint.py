"""Saves and restores the training state and the data position with Orbax.

It also writes digests of the files, because Orbax does not verify their contents.
"""

from collections.abc import Callable
from concurrent import futures
import contextlib
from typing import Any

from etils import epath
import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from cm3leon_jax import distributed
from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.files import buckets
from cm3leon_jax.files.atomic import absolute, exists
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.mesh import abstract
from cm3leon_jax.stages.stages import SEALS
from cm3leon_jax.weights import sealing, stored
from cm3leon_jax.weights.retention import METRIC, policy, score

FOLDER = "checkpoints"
BEST = "best"  # Key in the item `data` of a checkpoint.
FINISH_SECONDS = 300.0  # A process that ends with an error waits this long for its own save.
# A process that ends with an error waits this long for the digests of other processes, which may be
# dead.
PEER_SECONDS = 60.0


class Checkpoints:
  """Saves, lists, verifies and deletes the checkpoints of one run.

  All processes of a run call the same methods in the same order. `save` returns as soon as the
  state is copied to host memory. A thread then waits until Orbax has written the files. After that,
  process I writes the digests of its share of the files to STEP.partI, and process 0 merges these
  parts into STEP.json. This seals the checkpoint. An unsealed checkpoint is never restored.

    with Checkpoints(folder, keep=2) as checkpoints:
      checkpoints.save(state, step, next_row)

  The end of the `with` block waits for an unfinished save, also after an error.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    keep: int,
    keep_every: int = 0,
    keep_best: int = 0,
    check: Callable[[], None] = lambda: None,
  ):
    """Opens the checkpoints in `folder`.

    Args:
      keep: number of newest checkpoints to keep.
      keep_every: checkpoints whose step is a multiple of `keep_every` are also kept; 0: none.
      keep_best: number of checkpoints with the lowest held-out loss that are also kept.
      check: called before a save starts and before it is sealed. If `check` raises an error, the
        checkpoint is not saved or not sealed.

    Raises:
      TryAgain: the folder of a checkpoint could not be read.
    """
    self.folder = absolute(folder) / FOLDER
    with distributed.together():
      present = sealing.steps_in(self.folder)
    self.digest_folder = self.folder.parent / SEALS
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy(keep, keep_every, keep_best),
      best_fn=score if keep_best else None,  # With `best_fn`, Orbax stores `METRIC` per checkpoint.
      create=True,
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    with distributed.together():  # Orbax silently omits a folder that it cannot read.
      listed = self._manager.all_steps()
      if lacking := (present - {*listed}) & sealing.steps_in(self.folder):
        raise TryAgain(
          f"{self.folder / str(min(lacking))} could not be read when the checkpoints were listed: "
          "nothing was deleted; run the same command again."
        )
    self._check, self._scores, self._closed = check, bool(keep_best), False
    self._save: sealing.Save | None = None
    self._good: int | None = None  # Step of the newest checkpoint known to match its digests.

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
    if error is None:
      return self.close()
    self._close_alone()
    if not isinstance(error, TryAgain) and (reason := buckets.failure(error)):
      raise TryAgain(f"{self.folder.parent}: {reason}: {self._back()}") from error

  def steps(self) -> list[int]:
    """Returns the sorted steps of all checkpoints that are complete on disk, sealed or not."""
    return sorted(self._manager.all_steps())

  def sealed(self) -> list[int]:
    """Returns the sorted steps of all sealed checkpoints, as this process sees them.

    Raises:
      TryAgain: the folder of the digests could not be read.
    """
    sealed = []
    with distributed.together():
      for step in self.steps():
        with sealing.reading(self._digest_path(step)):
          sealed += [step] if exists(self._digest_path(step)) else []
    return sealed

  def delete(self, step: int) -> None:
    """Deletes a checkpoint and its digests."""
    if distributed.is_first():
      self._remove_digests(lambda s: s == step)
    self._manager.delete(step)

  def delete_after(self, step: int) -> None:
    """Deletes all checkpoints of steps after `step`, newest first, and their digests."""
    for newer in reversed(distributed.gather(self.steps())[0]):
      if newer > step:
        self.delete(newer)
    if distributed.is_first():
      self._remove_digests(lambda s: s > step)  # Also of missing checkpoints.

  def seal(self, step: int) -> None:
    """Seals a checkpoint that is complete on disk. Raises TryAgain if it could not be read."""
    with distributed.together():
      if distributed.is_first():  # A job with another number of processes may have left STEP.partI.
        self._remove_digests(lambda s: s == step)
    self._save = sealing.Save(step, self._seal)
    self.wait()

  def newest(self) -> int | None:
    """Returns the step of the newest sealed checkpoint, or None."""
    return distributed.gather(max(self.sealed(), default=None))[0]

  def save(
    self, state: PyTree, step: int, next_row: int, heldout_loss: float | None = None,
    best: tuple[int, float] | None = None,
  ) -> None:  # fmt: skip
    """Waits until the previous save is sealed, then starts to save `state`.

    Args:
      state: a tree of arrays. The caller may donate it as soon as `save` has returned.
      step: number of steps taken, which names the checkpoint.
      heldout_loss: the loss by which `keep_best` chooses the best checkpoints.
      best: the step with the lowest held-out loss so far, and this loss, for `best`.

    Raises:
      TryAgain: this save or the previous save failed.
    """
    self.wait()
    self._check()
    # A killed run may have left digests of this step. Deleting them here is safe, because Orbax
    # writes only after all processes have called `save`.
    if distributed.is_first():
      self._remove_digests(lambda s: s == step)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state, stored.save_args(state)),
      data=ocp.args.JsonSave({"next_row": next_row, **({BEST: best} if best else {})}),
    )
    metrics = {METRIC: heldout_loss} if self._scores else None
    try:
      self._manager.save(step, args=args, metrics=metrics, force=True)
    except OSError as error:
      raise self._failure(step, error) from error
    self._save = sealing.Save(step, self._seal)

  def check_save(self) -> None:
    """Raises the error of the current save, if it has failed. Called after every step.

    Raises:
      TryAgain: the checkpoint could not be written.
    """
    for part in (self._save.share, self._save.sealed) if self._save else ():
      if part.done():
        part.result()

  def wait(self) -> None:
    """Waits until the current save is complete on disk, with its digests.

    Raises:
      TryAgain: the checkpoint could not be written.
    """
    save, self._save = self._save, None
    if save is None:
      return
    with distributed.together():
      save.share.result()
    with distributed.together():  # All parts exist, so process 0 will seal soon.
      save.sealed.result()
    self._good = save.step

  def _seal(self, save: sealing.Save) -> None:
    """Writes digests of this process's share of the files. On process 0, then seals the checkpoint.

    Runs in a thread.
    """
    for outcome, work in ((save.share, self._digest_share), (save.sealed, self._merge)):
      try:
        work(save)
        outcome.set_result(None)
      except UserError as error:
        return outcome.set_exception(error)
      except Exception as error:  # Orbax, TensorStore, a disk or a GCS bucket failed.
        failure = self._failure(save.step, error)
        failure.__cause__ = error
        return outcome.set_exception(failure)

  def _digest_share(self, save: sealing.Save) -> None:
    """Waits until Orbax has written the files, then writes digests of this process's share."""
    self._manager.wait_until_finished()
    result = sealing.digests(self.folder / str(save.step))
    write_json(self._part(save.step, jax.process_index()), result)

  def _merge(self, save: sealing.Save) -> None:
    """Merges the digests of all processes into one file, which seals the checkpoint.

    Only process 0 does this. It waits for the digests of all processes. If `save.ending` is set
    before they exist, the checkpoint is not sealed.
    """
    if not distributed.is_first():
      return
    parts = [self._part(save.step, i) for i in range(jax.process_count())]
    names = {part.name for part in parts}
    while not names <= {path.name for path in self.digest_folder.iterdir()}:
      if save.ending.wait(0.2):
        return
    self._check()
    digests = {name: value for part in parts for name, value in read_json(part).items()}
    write_json(self._digest_path(save.step), digests)
    self._good = save.step
    for part in parts:
      part.unlink()
    kept = set(self._manager.all_steps())
    self._remove_digests(lambda s: s not in kept)

  def _failure(self, step: int, error: Exception) -> TryAgain:
    return TryAgain(
      f"checkpoint {step} could not be written to {self.folder} ({error or type(error).__name__}): "
      f"{self._back()}"
    )

  def _back(self) -> str:
    """Returns the end of an error message: the checkpoint from which a restarted run continues."""
    at = f"checkpoint {self._good}" if self._good else "its newest checkpoint, if it has one"
    return f"the same command continues from {at}."

  def _remove_digests(self, of: Callable[[int], bool]) -> None:
    """Deletes the digest files, merged or not, of all steps for which `of(step)` is True."""
    for path in self.digest_folder.glob("*"):
      step = path.name.partition(".")[0]
      if step.isdecimal() and of(int(step)):  # File systems may add other files.
        path.unlink()

  def restore(self, state: PyTree, step: int) -> tuple[Any, int]:
    """Restores a checkpoint. Does not compare its files with their digests; `damage` does.

    `state` is a state on the current mesh, or only the shapes, dtypes and shardings of its arrays.
    Returns the restored state and the next row of the data to read.
    """
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract(state, jax.sharding.get_mesh())),
      data=ocp.args.JsonRestore(),
    )
    restored = self._manager.restore(step, args=args)
    self._good = step
    return restored["state"], restored["data"]["next_row"]

  def next_row(self, step: int) -> int:
    """Returns the position in the data at which training continues from a checkpoint."""
    return self._data(step)["next_row"]

  def _data(self, step: int) -> dict:
    args = ocp.args.Composite(data=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)["data"]

  def best(self, step: int) -> tuple[int, float] | None:
    """Returns the checkpoint up to `step` with the lowest held-out loss, and this loss.

    Returns None if the run has no `train.patience`, or if that checkpoint was deleted.
    """
    found, sealed = None, self.sealed()
    missing = contextlib.suppress(FileNotFoundError, KeyError, ValueError)  # `check` names damage.
    with distributed.together(), sealing.reading(self.folder / str(step)), missing:
      found = self._data(step).get(BEST)
    first = distributed.gather(found if found and found[0] in sealed else None)[0]
    return first and (int(first[0]), float(first[1]))

  def restore_params(self, types: dict, step: int, average: bool = True) -> dict:
    """Restores only the parameters, onto the current mesh; see `restore` and `load_params`.

    `types` contains their shapes, dtypes and shardings.
    """
    types = abstract(types, jax.sharding.get_mesh())
    state = self.folder / str(step) / "state"
    name, args = stored.restore_args(state, types, None if average else False)
    return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"][name]

  def check(self, step: int) -> None:
    """Raises UserError if a file of the checkpoint differs from its digest; see `damage`."""
    if not (damage := self.damage(step)):
      return
    others = [s for s in self.sealed() if s != step]
    remedy = "no other checkpoint is sealed: restore the file from a copy"
    if others:
      remedy = (
        f"to go back, run `cm3leon checkpoints rollback --workdir={self.folder.parent.parent} "
        f"--step={others[-1]}`, then `cm3leon train`"
      )
    raise UserError(f"{damage}; {remedy}.")

  def damage(self, step: int) -> str | None:
    """Returns a message about a file that differs from its digest, or None if all files match.

    Raises:
      TryAgain: a file could not be read, so its content is unknown.
    """
    with distributed.together():
      try:
        with sealing.reading(self._digest_path(step)):
          expected = read_json(self._digest_path(step))
      except TryAgain:
        raise
      except UserError:
        expected = None
      if not isinstance(expected, dict) or not expected:
        damage: str | None = f"{self._digest_path(step)} is damaged: it has no digests"
      else:
        damage = sealing.damage(self.folder / str(step), expected)
    return next(filter(None, distributed.gather(damage)), None)

  def digest(self, step: int) -> str | None:
    """Returns the SHA-256 of the file that contains the digests of a checkpoint."""
    return digest(self._digest_path(step))

  def close(self) -> None:
    """Waits for the last save and closes Orbax's manager."""
    if not self._closed:
      self.wait()
      self._closed = True
      self._manager.close()

  def _close_alone(self) -> None:
    """Finishes the current save after an error, without the other processes, which may be dead.

    If the program ended without this call, Orbax's threads would stop in the middle of the save.
    """
    save, self._save = self._save, None
    if save is not None and not self._closed:
      with contextlib.suppress(futures.TimeoutError, UserError):  # The user sees the first error.
        save.share.result(FINISH_SECONDS)
        save.sealed.result(PEER_SECONDS)
      save.ending.set()
      save.thread.join(FINISH_SECONDS)
    if not self._closed:
      self._closed = True
      with contextlib.suppress(Exception):  # `close` may raise the save's error again.
        self._manager.close()

  def _digest_path(self, step: int) -> epath.Path:
    return self.digest_folder / f"{step}.json"

  def _part(self, step: int, process: int) -> epath.Path:
    return self.digest_folder / f"{step}.part{process}"
