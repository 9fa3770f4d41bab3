"""Describes files by size and SHA-256, and detects files that were changed."""

import functools
import hashlib
import json
import os
from typing import Any

from etils import epath

from cm3leon_jax.files.atomic import exists


def digest(path: epath.PathLike) -> str | None:
  """Returns the SHA-256 of a file, or None if it does not exist.

  Raises:
    OSError: the file could not be read.
  """
  path = epath.Path(path)
  if not exists(path):
    return None
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except (FileNotFoundError, IsADirectoryError):
    return None


def digest_of_json(value: Any) -> str:
  """Returns the SHA-256 of a value as JSON. The order of fields matters."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def describe(path: epath.PathLike) -> dict:
  """Returns size and SHA-256 of a file. Each process reads an unchanged file only once.

  describe("lengths.npy")
  {"bytes": 4128, "sha256": "9f86d081..."}
  """
  path = epath.Path(path)
  size, modified = stamp(path)
  return {"bytes": size, "sha256": _digest_of(path, size, modified)}


def damage(path: epath.PathLike, expected: dict, content: bool = True) -> str | None:
  """Returns how a file differs from its description, or None if it does not differ.

  `expected` is the result of `describe` when the file was written, or only its "sha256". If
  `content` is False, only the sizes are compared.

  Raises:
    OSError: the file could not be read.
  """
  path = epath.Path(path)
  if not exists(path):
    return "is missing"
  size = stamp(path)[0]
  if size != expected.get("bytes", size):
    return f"has {size:,} bytes instead of {expected['bytes']:,}"
  if content and describe(path)["sha256"] != expected["sha256"]:
    return "has changed since it was written"
  return None


def stamp(path: epath.Path) -> tuple[int, int]:
  """Returns the size in bytes and the modification time of a file."""
  if "://" in os.fspath(path):
    result = path.stat()
    return result.length, result.mtime or 0
  local = os.stat(path)
  return local.st_size, local.st_mtime_ns


@functools.lru_cache(4_096)
def _digest_of(path: epath.Path, size: int, modified: int) -> str | None:
  """Computes `digest` once per path, `size` and `modified`, which are the key of a cache."""
  return digest(path)
