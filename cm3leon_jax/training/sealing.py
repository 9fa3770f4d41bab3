"""Digests of the files of a checkpoint, and a save in flight."""

from collections.abc import Callable
from concurrent import futures
import os
import threading

from etils import epath
import jax

from cm3leon_jax import buckets
from cm3leon_jax.io import digest


def files_below(folder: epath.Path) -> list[str]:
  """Returns the relative paths of all files below `folder`, sorted."""
  files = []
  for path in folder.iterdir():  # Buckets have no recursive glob.
    is_folder = _is_folder(path)
    files += [f"{path.name}/{name}" for name in files_below(path)] if is_folder else [path.name]
  return sorted(files)


def _is_folder(path: epath.Path) -> bool:
  """Returns whether a path is a folder; in a bucket, `is_dir` hides that no answer came."""
  return path.stat().is_directory if "://" in os.fspath(path) else path.is_dir()


def _share(names: list[str]) -> list[str]:
  """Returns the names of the files that this process digests or checks."""
  return names[jax.process_index() :: jax.process_count()]


def digests(folder: epath.Path) -> dict[str, str | None]:
  """Returns the digests of this process's share of the files below `folder`."""
  return {name: digest(folder / name) for name in _share(files_below(folder))}


def damage(folder: epath.Path, expected: dict) -> str | None:
  """Says which file of this process's share is not as its digest says, or None.

  Raises:
    OSError: a bucket did not answer.
  """
  name = ""
  try:
    for name in _share(sorted({*expected, *files_below(folder)})):
      if expected.get(name) != digest(folder / name):
        return f"{folder / name} is damaged: it is not what was written"
  except OSError as error:
    if buckets.failure(error):  # No damage: a checkpoint that is damaged is deleted.
      raise
    return f"{folder / name} cannot be read ({error})"
  return None


class Save:
  """A save in flight, and the thread that seals it.

  Attributes:
    step: of the checkpoint.
    share: is done when this process has digested its share of the files.
    sealed: is done when the checkpoint counts; on other processes than the first, with `share`.
    ending: set when nobody waits for the other processes any more.
  """

  def __init__(self, step: int, run: Callable[["Save"], None]):
    self.step = step
    self.share: futures.Future[None] = futures.Future()
    self.sealed: futures.Future[None] = futures.Future()
    self.ending = threading.Event()
    self._thread = threading.Thread(target=run, args=(self,), name=f"seal-{step}", daemon=True)
    self._thread.start()

  def join(self, seconds: float) -> None:
    """Waits for the thread, at most so many seconds."""
    self._thread.join(seconds)
