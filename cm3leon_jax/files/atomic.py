"""Files that are written whole or not at all, and paths on disks and in buckets."""

from collections.abc import Iterator
import contextlib
import errno
import os
from typing import IO, Any

from etils import epath
import fsspec

from cm3leon_jax import extras
from cm3leon_jax.config import UserError
from cm3leon_jax.files import buckets

# Errors that say for certain that there is no such file.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def open_filesystem(path: epath.PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
  """Returns the filesystem of a path or URL, and the path in it.

  A name with `::` stays a name, while fsspec takes it for a chain of URLs: a stranger's name of an
  image must not open anything else.

  Raises:
    UserError: the URL holds `::`, is on S3, or its filesystem is not known or not installed.
  """
  path = os.fspath(path)
  if "://" not in path:
    return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(path))
  if "::" in path:
    raise UserError(f"{path} holds '::', a chain of URLs, which is not read: rename the file.")
  buckets.check_path(path)
  try:
    return fsspec.core.url_to_fs(path)
  except (ImportError, ValueError) as error:
    raise UserError(
      f"{path} cannot be opened: {error} (buckets need {extras.install('data')})."
    ) from error


@contextlib.contextmanager
def partial_path(path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a path beside `path`; the file that the body writes there replaces `path` at its end.

  Its content is on the disk before, so that a power loss leaves no empty file. If the body fails,
  what it has written is deleted.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / (path.name + ".partial")
  try:
    yield partial
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise
  sync(partial)
  partial.replace(path)


@contextlib.contextmanager
def replacing(path: epath.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
  """Opens a file that replaces `path` when the body ends: readers see a whole file, old or new."""
  encoding = {} if "b" in mode else {"encoding": "utf-8"}
  with partial_path(path) as partial, partial.open(mode, **encoding) as file:
    yield file


def sync(path: epath.PathLike) -> None:
  """Returns when the content of a local file is on the disk; an object in a bucket is stored."""
  if "://" in os.fspath(path):
    return
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


def exists(path: epath.PathLike) -> bool:
  """Returns whether there is a file or folder at a path, known for certain.

  `Path.exists` returns False at any error, as if the file were gone.

  Raises:
    OSError: a disk did not say, such as one in the network that is away.
  """
  if "://" in os.fspath(path):
    return epath.Path(path).exists()
  try:
    os.stat(path)
  except ValueError:  # A null byte in the name.
    return False
  except OSError as error:
    if error.errno in NOT_THERE:
      return False
    raise
  return True


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns the absolute path; epath takes gs://bucket for a folder "gs:" in the current one."""
  path = epath.Path(path)
  return path if "://" in os.fspath(path) else path.resolve()
