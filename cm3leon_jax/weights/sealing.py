"""Computes and compares digests of a checkpoint's files, and describes the save in progress."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import os
import stat
import threading

from etils import epath
import jax

from cm3leon_jax.errors import TryAgain
from cm3leon_jax.files.digests import digest


def files_below(folder: epath.Path) -> list[str]:
  """Returns the relative paths of all files below `folder`, sorted."""
  files = []
  for path in folder.iterdir():  # GCS buckets have no recursive glob.
    is_folder = _is_folder(path)
    files += [f"{path.name}/{name}" for name in files_below(path)] if is_folder else [path.name]
  return sorted(files)


def steps_in(folder: epath.Path) -> set[int]:
  """Returns the steps that have a subfolder in `folder`, the folder of the checkpoints.

  For a GCS bucket the result is always empty, because this check is not needed there: Orbax itself
  raises an error if it cannot list the checkpoints.

  Raises:
    TryAgain: the folder could not be read.
  """
  if "://" in os.fspath(folder):
    return set()
  with reading(folder):
    try:
      paths = list(folder.iterdir())
    except FileNotFoundError:
      return set()
    numbers = [p for p in paths if p.name.isdecimal() and p.name == str(int(p.name))]
    return {int(p.name) for p in numbers if _is_folder(p)}


def _is_folder(path: epath.Path) -> bool:
  """Returns whether a path is a folder. Unlike `is_dir`, it raises an error if a read fails."""
  if "://" in os.fspath(path):
    return path.stat().is_directory
  try:
    return stat.S_ISDIR(os.stat(path).st_mode)
  except FileNotFoundError:  # The path is a link to a file that was deleted.
    return False


def _share(names: list[str]) -> list[str]:
  """Returns the files of `names` whose digests this process computes."""
  return names[jax.process_index() :: jax.process_count()]


def digests(folder: epath.Path) -> dict[str, str | None]:
  """Returns the digests of this process's share of the files below `folder`.

  Raises:
    TryAgain: a file could not be read.
    OSError: a GCS bucket did not answer.
  """
  with reading(folder):
    names = _share(files_below(folder))
  return {name: _digest(folder / name) for name in names}


def damage(folder: epath.Path, expected: dict) -> str | None:
  """Returns a message about the first file that differs from its digest, or None.

  `expected` maps the path of each file, relative to `folder`, to its digest. Each process checks
  only its share of the files. A file that cannot be read does not count as damaged, because damaged
  checkpoints may be deleted.

  Raises:
    TryAgain: a file could not be read.
    OSError: a GCS bucket did not answer.
  """
  with reading(folder):
    try:
      found = files_below(folder)
    except (FileNotFoundError, NotADirectoryError):
      found = []
  for name in _share(sorted({*expected, *found})):
    if expected.get(name) != _digest(folder / name):
      return f"{folder / name} is damaged: it is not what was written"
  return None


def _digest(path: epath.Path) -> str | None:
  with reading(path):
    return digest(path)


@contextlib.contextmanager
def reading(path: epath.PathLike) -> Iterator[None]:
  """Raises `TryAgain` if the body cannot read `path`, a file or folder of a checkpoint.

  A failed read does not prove that a file is absent or damaged. A network disk may be unavailable,
  or the process may have too many open files.
  """
  try:
    yield
  except OSError as error:
    where = error.filename or os.fspath(path)
    raise TryAgain(
      f"{where} cannot be read ({error.strerror or error}), so its content is unknown and nothing "
      "was deleted: fix the disk or the permissions, and run the same command again."
    ) from error


class Save:
  """A save that is in progress, and the thread that seals it.

  Attributes:
    share: future that is done when this process has written the digests of its share of the files.
    sealed: future that is done when the checkpoint is sealed. On processes other than 0, it is done
      immediately after `share`.
    ending: event; once it is set, process 0 no longer waits for digests of other processes.
  """

  def __init__(self, step: int, run: Callable[["Save"], None]):
    self.step = step
    self.share: futures.Future[None] = futures.Future()
    self.sealed: futures.Future[None] = futures.Future()
    self.ending = threading.Event()
    self.thread = threading.Thread(target=run, args=(self,), name=f"seal-{step}", daemon=True)
    self.thread.start()
