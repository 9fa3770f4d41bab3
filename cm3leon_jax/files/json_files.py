"""JSON files and files of JSON lines: those of a workdir, and those of other programs."""

from collections.abc import Mapping
import json
import os
import stat
from typing import Any

from etils import epath

from cm3leon_jax.config import UserError, short
from cm3leon_jax.files import buckets, digests
from cm3leon_jax.files.atomic import exists, replacing

# Fields of a JSON object, and their types; float admits whole numbers.
Fields = Mapping[str, type]
GET_AGAIN = "get it again from where it was published"  # Of a file that no stage wrote.
FOREIGN_BYTES = 2**26  # Read, JSON takes 50 times its bytes; large tokenizers have 2^25.
NAMES = {dict: "object", list: "list", str: "string", int: "whole number", float: "number"}


def plain(value: Any) -> Any:
  """Returns a value as it is read from JSON: tuples as lists, numpy scalars as numbers."""
  return json.loads(json.dumps(value, default=lambda x: x.item() if hasattr(x, "item") else str(x)))


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file, see `replacing`."""
  with replacing(path, "w") as file:
    file.write(json.dumps(plain(value), indent=1) + "\n")


def read_json(
  path: epath.PathLike,
  fields: Fields | None = None,
  remedy: str = "delete it and run its stage again",
) -> Any:
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


def lacks(value: Any, fields: Fields | None) -> str:
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
  if most_bytes is not None and exists(path) and (size := digests.stamp(path)[0]) > most_bytes:
    raise UserError(f"{path} has {size:,} bytes; it may have {most_bytes:,}: {GET_AGAIN}.")


def read_foreign_json(path: epath.PathLike, fields: Fields | None = None) -> Any:
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
