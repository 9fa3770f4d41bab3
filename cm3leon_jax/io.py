"""Files of a workdir: written whole, as JSON or JSON lines, and their digests."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import functools
import hashlib
import json
import os
import stat

from etils import epath
import fsspec

from cm3leon_jax import buckets, extras
from cm3leon_jax.config import UserError, short


def open_filesystem(path: epath.PathLike):
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
def replacing(path: epath.PathLike, mode: str = "wb"):
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


def plain(value):
  """Returns a value as it is read from JSON: tuples as lists, numpy scalars as numbers."""
  return json.loads(json.dumps(value, default=lambda x: x.item() if hasattr(x, "item") else str(x)))


def write_json(path: epath.PathLike, value) -> None:
  """Writes a JSON file, see `replacing`."""
  with replacing(path, "w") as file:
    file.write(json.dumps(plain(value), indent=1) + "\n")


# Errors that say for certain that there is no such file.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
# Fields of a JSON object, and their types; float admits whole numbers.
Fields = Mapping[str, type]
GET_AGAIN = "get it again from where it was published"  # Of a file that no stage wrote.
FOREIGN_BYTES = 2**26  # Read, JSON takes 50 times its bytes; large tokenizers have 2^25.
NAMES = {dict: "object", list: "list", str: "string", int: "whole number", float: "number"}


def read_json(
  path: epath.PathLike,
  fields: Fields | None = None,
  remedy: str = "delete it and run its stage again",
):
  """Reads a JSON file.

  Args:
    path: of the file.
    fields: that it has, if it is an object; None: it is any value.
    remedy: what helps if it is damaged.

  Raises:
    UserError: it is absent or damaged, or lacks a field.
    ValueError: a bucket did not answer as it should, see `buckets.failure`.
    OSError: it could not be read, so that its content is not known.
  """
  path = epath.Path(path)
  if not exists(path):
    raise UserError(f"{path} does not exist: run the stage that writes it first.")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:  # ValueError: also of bytes that are no UTF-8.
    if buckets.failure(error):  # The content is not known, so it does not count as damaged.
      raise
    raise UserError(f"{path} is not valid JSON ({error}): {remedy}.") from error
  if lack := lacks(value, fields):
    raise UserError(f"{path} is damaged: {lack}; {remedy}.")
  return value


def lacks(value, fields: Fields | None) -> str:
  """Says what keeps a value from being an object with these fields; "" if nothing does."""
  if fields is None:
    return ""
  if not isinstance(value, dict):
    return f"it must be a JSON object, and is {short(value)}"
  for name, kind in fields.items():
    found = value.get(name)
    right = (int, float) if kind is float else kind
    if not isinstance(found, right) or isinstance(found, bool):
      return f"its field '{name}' must be of type {NAMES[kind]}, and is {short(found)}"
  return ""


def check_foreign(path: epath.PathLike, most_bytes: int | None = None) -> None:
  """Checks a file that another program wrote, before it is opened.

  Raises:
    UserError: there is no regular file at a local path, but a folder, or a pipe or device that may
      never end; or it has more than `most_bytes`.
  """
  path = epath.Path(path)
  if "://" not in os.fspath(path) and exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
    raise UserError(f"{path} is no regular file: {GET_AGAIN}.")
  if most_bytes is not None and exists(path) and (size := _stamp(path)[0]) > most_bytes:
    raise UserError(f"{path} has {size:,} bytes; it may have {most_bytes:,}: {GET_AGAIN}.")


def read_foreign_json(path: epath.PathLike, fields: Fields | None = None):
  """Reads a JSON file that another program wrote, of at most `FOREIGN_BYTES`.

  Raises:
    UserError: as `check_foreign` and `read_json`.
  """
  check_foreign(path, FOREIGN_BYTES)
  return read_json(path, fields, GET_AGAIN)


def read_json_lines(path: epath.PathLike, fields: Fields | None = None) -> list[dict]:
  """Reads the objects of a JSON-lines file, without a last line that a kill left incomplete.

  Raises:
    UserError: a line before the last one is damaged, or a line lacks one of `fields`.
    OSError: the file could not be read.
  """
  path = epath.Path(path)
  lines = path.read_bytes().rstrip(b"\n").split(b"\n") if exists(path) else []
  values = []
  for number, line in enumerate(lines, 1):
    try:
      value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
      if number == len(lines):
        break
      raise UserError(
        f"{path}, line {number} is not valid JSON ({error}): delete this line, or the file."
      ) from error
    if lack := lacks(value, fields or {}):
      raise UserError(f"{path}, line {number}: {lack}. Delete this line, or the file.")
    values.append(value)
  return values


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
  size, modified = _stamp(path)
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
