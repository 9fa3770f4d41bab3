"""Descriptions of files, size and SHA-256, and how a file differs from its description."""

import functools
import hashlib
import os

from etils import epath

from cm3leon_jax.files.atomic import exists


def digest(path: epath.PathLike) -> str | None:
  """Returns the SHA-256 of a file, or None if it does not exist.

  Raises:
    OSError: it could not be read.
  """
  path = epath.Path(path)
  if not exists(path):
    return None
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except (FileNotFoundError, IsADirectoryError):
    return None


def describe(path: epath.PathLike) -> dict:
  """Returns size and SHA-256 of a file; an unchanged file is read once in a process.

  describe("lengths.npy")
  {"bytes": 4128, "sha256": "9f86d081..."}
  """
  path = epath.Path(path)
  size, modified = stamp(path)
  return {"bytes": size, "sha256": _digest_of(path, size, modified)}


def damage(path: epath.PathLike, expected: dict, content: bool = True) -> str | None:
  """Says how a file differs from its description, or returns None.

  Args:
    path: of the file.
    expected: result of `describe` when it was written.
    content: whether to compare the content, too, and not only the size.

  Raises:
    OSError: it could not be read.
  """
  path = epath.Path(path)
  if not exists(path):
    return "is missing"
  size = stamp(path)[0]
  if size != expected["bytes"]:
    return f"has {size:,} bytes instead of {expected['bytes']:,}"
  if content and describe(path) != expected:
    return "has another content than when it was written"
  return None


def stamp(path: epath.Path) -> tuple[int, int]:
  """Returns the size of a file, and when it was modified."""
  if "://" in os.fspath(path):
    found = path.stat()
    return found.length, found.mtime or 0
  local = os.stat(path)
  return local.st_size, local.st_mtime_ns


@functools.lru_cache(4_096)
def _digest_of(path: epath.Path, size: int, modified: int) -> str | None:
  """Returns `digest` of the file that had this size when it was modified."""
  return digest(path)
