"""Reads files of public releases. Error messages name the file and the id."""

from collections.abc import Iterator, Mapping
import json
from typing import Any

from etils import epath

from cm3leon_jax.data.sources.lines import file_lines
from cm3leon_jax.errors import UserError

KINDS = {str: "a text", int: "an integer", list: "a list", dict: "an object"}


def check_split(name: str, split: str, splits: Mapping[str, tuple[str, ...]]) -> None:
  """Raises UserError if the format `name` or its `split` is unknown. () allows any split."""
  if name not in splits:
    raise UserError(f"The format is '{name}'; it must be one of {', '.join(splits)}.")
  if splits[name] and split not in splits[name]:
    raise UserError(
      f"The split of format '{name}' is '{split}'; it must be one of {', '.join(splits[name])}."
    )


def find_file(root: epath.PathLike, name: str, split: str, *names: str) -> epath.Path:
  """Returns the first file in `names` that exists in `root`. Raises UserError if none exists."""
  found = next((path for n in names if (path := epath.Path(root) / n).exists()), None)
  if found is None:
    raise UserError(
      f"{root} has no {' or '.join(names)}, which format '{name}' needs for split '{split}'."
    )
  return found


def load_json(file: epath.PathLike, kind: type = dict) -> Any:
  """Reads a JSON file. Raises UserError unless its top-level value has the type `kind`."""
  path = epath.Path(file)
  if not path.exists():
    raise UserError(f"{file} does not exist; give the file of the release.")
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise UserError(f"{file} is not valid JSON ({error}).") from error
  if not isinstance(content, kind):
    raise UserError(f"{file} has the wrong format; it must be {KINDS[kind]} in JSON.")
  return content


def read_json_lines(file: epath.PathLike) -> Iterator[tuple[str, object]]:
  """Yields (place, content) of each nonblank line, e.g. ("a.jsonl, line 1", {...}).

  Raises:
    UserError: a line is not JSON. The message names the file and the line.
  """
  for where, line in file_lines(file):
    try:
      content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
      raise UserError(f"{where} is not valid JSON ({error}).") from error
    yield where, content


def field_of(entry: Any, name: str, kind: type, where: object) -> Any:
  """Returns a field of an entry. Raises UserError unless the field exists and has type `kind`."""
  value = entry.get(name) if isinstance(entry, dict) else None
  if not isinstance(value, kind) or isinstance(value, bool):
    raise UserError(f"{where} must be an object with {KINDS[kind]} in its field '{name}'.")
  return value


def entries_by_id(entries: list, name: str, kind: type, where: str) -> dict:
  """Returns {value of the field `name`: entry}. Raises UserError if a value occurs twice."""
  found = {}
  for number, entry in enumerate(entries, 1):
    key = field_of(entry, name, kind, f"{where}, entry {number}")
    if key in found:
      raise UserError(f"{where}: {name} {key} occurs twice; it must be unique.")
    found[key] = entry
  return found


def texts_of(entries: list, name: str, where: str) -> tuple[str, ...]:
  """Returns the text in the field `name` of each entry. Raises UserError without entries."""
  if not entries:
    raise UserError(f"{where} has no '{name}'; it must have at least one.")
  return tuple(field_of(e, name, str, f"{where}, entry {n}") for n, e in enumerate(entries, 1))


def text_list(entry: Any, name: str, where: str) -> tuple[str, ...]:
  """Returns the texts in the list `name`. Raises UserError if it is empty or has a non-text."""
  values = field_of(entry, name, list, where)
  if not values or not all(isinstance(value, str) for value in values):
    raise UserError(f"{where} must have at least one text, and only texts, in its list '{name}'.")
  return tuple(values)
