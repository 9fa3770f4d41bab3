"""Reads instruction records in a general format: one JSON object per line."""

from collections.abc import Iterator
import re

from etils import epath

from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.published.releases import read_json_lines
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.errors import UserError, did_you_mean

FIELDS = ("key", "group", "texts", "images", "facts")


def read_lines(file: epath.PathLike, images: ImageFolder) -> Iterator[Record]:
  """Yields one record per line that is not blank.

    {"texts": {"question": "how many?", "answer": "two"}, "images": {"image": "a/7.jpg"}} in line 3
    of the file becomes Record("3", "a/7.jpg", {"question": "how many?", "answer": "two"},
    {"image": "IMAGES/a/7.jpg"})

  Args:
    file: JSONL file. Its lines have the field `texts`, {name: text}, the field `images`,
      {name: path}, or both. The optional field `key` must be unique in the file; its default is the
      line number. The default of `group` is the path of the first image, or `key` without images.
      The optional field `facts` is an object by which a judge decides whether an answer is correct.
    images: folder to which the paths are relative. Absolute paths and URLs are used unchanged.

  Raises:
    UserError: a line is not JSON, a field is unknown or has the wrong type, a name cannot be a
      field of a template, a key occurs twice, or an image is outside the folder. The message
      names the file and the line.
  """
  seen: dict[str, str] = {}
  for where, entry in read_json_lines(file):
    if not isinstance(entry, dict):
      raise UserError(f"{where} must be an object with the fields 'texts' and 'images'.")
    if unknown := [name for name in entry if name not in FIELDS]:
      hint = did_you_mean(unknown[0], FIELDS, f"the fields are {', '.join(FIELDS)}.")
      raise UserError(f"{where} has the field '{unknown[0]}': {hint}")
    texts, paths = (_named(entry, field, where) for field in ("texts", "images"))
    if not texts and not paths:
      raise UserError(f"{where} has no texts and no images; it must have at least one of them.")
    if both := [name for name in texts if name in paths]:
      raise UserError(f"{where} has '{both[0]}' both in 'texts' and in 'images': rename one.")
    number = where.rpartition(" ")[2]
    key = _name(entry, "key", where) or number
    if key in seen:
      raise UserError(f"{where} has the same key '{key}' as line {seen[key]}: rename one.")
    seen[key] = number
    group = _name(entry, "group", where) or next(iter(paths.values()), key)
    joined = {name: images.find(path, where) for name, path in paths.items()}
    if not isinstance(facts := entry.get("facts", {}), dict):
      raise UserError(f"{where} must have an object in its field 'facts'.")
    yield Record(key, group, texts, joined, facts)


def _named(entry: dict, field: str, where: str) -> dict[str, str]:
  """Returns the texts or paths of a line. Strips white space at both ends of each."""
  values = entry.get(field, {})
  if not isinstance(values, dict):
    raise UserError(f"{where} must have an object in its field '{field}'.")
  for name, value in values.items():
    if not re.fullmatch(r"\w+", name):
      raise UserError(
        f"{where} has the name '{name}' in '{field}'; a name in a template consists of letters, "
        "digits and '_'."
      )
    if not isinstance(value, str) or (field == "images" and not value.strip()):
      kind = "a text" if field == "texts" else "the path of a file"
      raise UserError(f"{where} must have {kind} under '{name}' in its field '{field}'.")
  return {name: value.strip() for name, value in values.items()}


def _name(entry: dict, field: str, where: str) -> str:
  """Returns the key or group of a line, or "" if the field is absent."""
  value = entry.get(field, "")
  if not isinstance(value, str) or (field in entry and not value.strip()):
    raise UserError(f"{where} must have a text in its field '{field}', or no such field.")
  return value
