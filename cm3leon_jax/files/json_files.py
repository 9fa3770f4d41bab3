"""Reads and writes JSON and JSON-lines files of this or other programs."""

from collections.abc import Mapping
import json
import os
import stat
from typing import Any

from etils import epath

from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files import buckets, digests
from cm3leon_jax.files.atomic import exists, replacing

# Maps the fields of a JSON object to their types. A field of type float may be a whole number.
Fields = Mapping[str, type]
# What to do if a file that no stage wrote is damaged.
GET_AGAIN = "download it again from where it was published"
# Parsed JSON takes up to 50 times the size of the file. Large tokenizers have 2^25 bytes.
FOREIGN_BYTES = 2**26
# 2^21 empty lists take 200 MB of memory. Tokenizers of 2^18 tokens have 2^21 commas and brackets.
FOREIGN_VALUES = 2**21
NAMES = {dict: "object", list: "list", str: "string", int: "whole number", float: "number"}


def plain(value: Any) -> Any:
  """Converts a value as if it were written to JSON and read back, e.g. tuples to lists."""
  return json.loads(json.dumps(value, default=lambda x: x.item() if hasattr(x, "item") else str(x)))


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes a JSON file atomically, see `atomic.replacing`."""
  with replacing(path, "w") as file:
    file.write(json.dumps(plain(value), indent=1) + "\n")


def read_json(
  path: epath.PathLike,
  fields: Fields | None = None,
  remedy: str = "delete it and run its stage again",
) -> Any:
  """Reads a JSON file.

  `fields` are the fields that the object must have; None allows any value. `remedy` is the part of
  the error message that says what to do if the file is damaged.

  Raises:
    UserError: the file is absent or damaged, or lacks a field.
    ValueError: access to a GCS bucket failed, see `buckets.failure`.
    OSError: the file could not be read, so its content is unknown.
  """
  path = epath.Path(path)
  if not exists(path):
    raise UserError(f"{path} does not exist: first run the stage that writes this file.")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:  # A ValueError means invalid JSON or invalid UTF-8.
    if buckets.failure(error):  # The content is unknown, not damaged.
      raise
    raise UserError(f"{path} is not valid JSON ({error}): {remedy}.") from error
  if lack := lacks(value, fields):
    raise UserError(f"{path} is damaged: {lack}; {remedy}.")
  return value


def lacks(value: Any, fields: Fields | None) -> str:
  """Returns why a value is not an object with these fields; "" if it is one."""
  if fields is None:
    return ""
  if not isinstance(value, dict):
    return f"it must be a JSON object, but is {short(value)}"
  for name, kind in fields.items():
    found = value.get(name)
    right = (int, float) if kind is float else kind
    if not isinstance(found, right) or isinstance(found, bool):
      return f"its field '{name}' must be of type {NAMES[kind]}, but is {short(found)}"
  return ""


def check_foreign(path: epath.PathLike, most_bytes: int | None = None) -> None:
  """Checks a file that another program wrote, before it is opened.

  Raises:
    UserError: a local path is not a regular file but, for example, a folder or a pipe, or the file
      has more than `most_bytes`.
  """
  path = epath.Path(path)
  if "://" not in os.fspath(path) and exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
    raise UserError(f"{path} is not a regular file: {GET_AGAIN}.")
  if most_bytes is not None and exists(path) and (size := digests.stamp(path)[0]) > most_bytes:
    raise UserError(f"{path} has {size:,} bytes; the maximum is {most_bytes:,}: {GET_AGAIN}.")


def check_foreign_json(path: epath.PathLike) -> None:
  """Raises UserError as `check_foreign`, or if a JSON file has too many bytes or values."""
  check_foreign(path, FOREIGN_BYTES)
  data = epath.Path(path).read_bytes() if exists(path) else b""
  if sum(map(data.count, (b"[", b"{", b","))) > FOREIGN_VALUES:
    raise UserError(f"{path} has more than {FOREIGN_VALUES:,} values: {GET_AGAIN}.")


def read_foreign_json(
  path: epath.PathLike, fields: Fields | None = None, remedy: str = GET_AGAIN
) -> Any:
  """Reads a JSON file that another program wrote. `fields` and `remedy`: see `read_json`.

  Raises:
    UserError: as `check_foreign_json` and `read_json`.
  """
  check_foreign_json(path)
  return read_json(path, fields, remedy)


def read_json_lines(path: epath.PathLike, fields: Fields | None = None) -> list[dict]:
  """Reads the objects of a JSON-lines file. Skips the last line if it is incomplete.

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
