"""Files of a workdir: written whole, as JSON or JSON lines, and their digests."""

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import json
import os

from etils import epath

from cm3leon_jax.config import UserError


@contextlib.contextmanager
def partial_path(path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a path beside `path`; the file that the body writes there replaces `path` at its end."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / (path.name + ".partial")
  yield partial
  partial.replace(path)


@contextlib.contextmanager
def replacing(path: epath.PathLike, mode: str = "wb", durable: bool = False):
  """Opens a file that replaces `path` when the body ends: readers see a whole file, old or new.

  Args:
    path: of the file.
    mode: to open it.
    durable: whether the content is on the disk before it replaces the old one, so that a power
      loss leaves no empty file.
  """
  encoding = {} if "b" in mode else {"encoding": "utf-8"}
  with partial_path(path) as partial, partial.open(mode, **encoding) as file:
    yield file
    if durable and "://" not in os.fspath(path):
      file.flush()
      os.fsync(file.fileno())


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns the absolute path; epath takes gs://bucket for a folder "gs:" in the current one."""
  path = epath.Path(path)
  return path if "://" in os.fspath(path) else path.resolve()


def plain(value):
  """Returns a value as it is read from JSON: tuples as lists, numpy scalars as numbers."""
  return json.loads(json.dumps(value, default=lambda x: x.item() if hasattr(x, "item") else str(x)))


def write_json(path: epath.PathLike, value) -> None:
  """Writes a JSON file durably, see `replacing`."""
  with replacing(path, "w", durable=True) as file:
    file.write(json.dumps(plain(value), indent=1) + "\n")


def read_json(path: epath.PathLike):
  """Reads a JSON file of the workdir. Raises UserError if it is absent or damaged."""
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f"{path} does not exist: run the stage that writes it first.")
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:  # ValueError: also of bytes that are no UTF-8.
    raise UserError(
      f"{path} is not valid JSON ({error}): delete it and run its stage again."
    ) from error


def read_json_lines(path: epath.PathLike) -> list[dict]:
  """Reads a JSON-lines file, without a last line that a kill left incomplete."""
  path = epath.Path(path)
  lines = path.read_text().splitlines() if path.exists() else []
  values = []
  for i, line in enumerate(lines):
    try:
      values.append(json.loads(line))
    except json.JSONDecodeError:
      if i + 1 < len(lines):
        raise
  return values


def digest(path: epath.PathLike) -> str | None:
  """Returns the SHA-256 of a file, or None if it does not exist."""
  path = epath.Path(path)
  if not path.exists():
    return None
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: epath.PathLike) -> dict:
  """Returns size and SHA-256 of a file; an unchanged file is read once in a process.

  describe("lengths.npy")
  {"bytes": 4128, "sha256": "9f86d081..."}
  """
  path = epath.Path(path)
  size, modified = _stamp(path)
  return {"bytes": size, "sha256": _digest_of(path, size, modified)}


def damage(path: epath.PathLike, expected: dict, content: bool = True) -> str | None:
  """Says how a file differs from its description, or returns None.

  Args:
    path: of the file.
    expected: result of `describe` when it was written.
    content: whether to compare the content, too, and not only the size.
  """
  path = epath.Path(path)
  if not path.exists():
    return "is missing"
  size = _stamp(path)[0]
  if size != expected["bytes"]:
    return f"has {size:,} bytes instead of {expected['bytes']:,}"
  if content and describe(path) != expected:
    return "has another content than when it was written"
  return None


def _stamp(path: epath.Path) -> tuple[int, int]:
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
