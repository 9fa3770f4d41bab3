"""Writes files atomically, and handles paths on local disks and in GCS buckets."""

from collections.abc import Iterator
import contextlib
import errno
import os
from typing import IO, Any

from etils import epath
import fsspec

from cm3leon_jax import extras
from cm3leon_jax.errors import UserError
from cm3leon_jax.files import buckets

FULL = (errno.ENOSPC, errno.EDQUOT)
# Values of errno which prove that a file does not exist.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def open_filesystem(path: epath.PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
  """Returns the filesystem of a path or URL, and the path inside this filesystem.

  fsspec interprets `::` in a URL as a chain of URLs. Such a URL is rejected, because the name of an
  image in untrusted data must not open another file. A local path may contain `::`.

  Raises:
    UserError: the URL contains `::` or is on S3, or its filesystem is unknown or not installed.
  """
  path = os.fspath(path)
  if "://" not in path:
    return fsspec.filesystem("file"), os.path.abspath(path)
  if "::" in path:
    raise UserError(f"{path} contains '::', which is not allowed in a URL: rename the file.")
  buckets.check_path(path)
  try:
    return fsspec.core.url_to_fs(path)
  except (ImportError, ValueError) as error:
    raise UserError(
      f"{path} cannot be opened: {error} (GCS buckets need {extras.install('data')})."
    ) from error


@contextlib.contextmanager
def partial_path(path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a temporary path. The file that the body writes there then replaces `path`.

  The file is flushed to the disk before it replaces `path`, so that a power loss leaves no empty
  file. If the body fails, the temporary file is deleted. If the disk is full, the error has `path`.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / (path.name + ".partial")
  try:
    yield partial
  except BaseException as error:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
      error.filename = os.fspath(path)
    raise
  sync(partial)
  partial.replace(path)


@contextlib.contextmanager
def replacing(path: epath.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
  """Opens a file that replaces `path` when the body ends. Readers never see a partial file."""
  encoding = {} if "b" in mode else {"encoding": "utf-8"}
  with partial_path(path) as partial, partial.open(mode, **encoding) as file:
    yield file


def sync(path: epath.PathLike) -> None:
  """Flushes the content of a local file to the disk. Objects in a GCS bucket need no flush."""
  if "://" in os.fspath(path):
    return
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


def exists(path: epath.PathLike) -> bool:
  """Returns whether a file or folder exists; raises an error if it cannot find out.

  In contrast, `Path.exists` returns False after any error, as if the file were deleted.

  Raises:
    OSError: the file system does not answer, for example because a network disk is unreachable.
  """
  if "://" in os.fspath(path):
    return epath.Path(path).exists()
  try:
    os.stat(path)
  except ValueError:  # The name contains a null byte.
    return False
  except OSError as error:
    if error.errno in NOT_THERE:
      return False
    raise
  return True


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns the absolute path, or the unchanged URL, which `resolve` would make a local path."""
  path = epath.Path(path)
  return path if "://" in os.fspath(path) else path.resolve()
