"""Defines and checks raw records: captioned images, texts and interleaved documents."""

import collections
from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import json
from typing import Any, TypeVar

from cm3leon_jax.errors import short, without_addresses

# Field -> names of the field in other tools. The first name that a record has is used.
ALIASES = {
  "image": ("image", "file_name", "image_path", "path", "jpg", "png", "image_bytes", "bytes"),
  "caption": ("caption", "text", "TEXT", "txt"),
  "source": ("source", "url", "URL"),
  "license": ("license", "licence", "LICENSE"),
  "attribution": ("attribution", "author", "credit"),
  "key": ("key", "id"),
}
SPLITS = ("train", "heldout", "bank")  # "bank": records that are only retrieved.
ORIGIN_FIELDS = ("kind", "source", "license", "attribution")
MOST_ORIGINS = 100  # Maximum number of origins that are listed separately.


def crop_key(key: str, number: int) -> str:
  """Returns the key of a random crop that `cm3leon prepare_data` adds to the pair `key`."""
  return f"{key} crop {number}"


@dataclasses.dataclass(frozen=True)
class RawPair:
  """A captioned image.

  Attributes:
    key: name of the record, unique in its folder.
    image: content of the file, or its path. Paths are relative in pairs.jsonl, but absolute in
      records that were read.
    group: name that near duplicates share. Records of a group are never neighbors of each other.
      "" means no group.
    split: one of SPLITS. "" lets `cm3leon prepare_data` choose between "train" and "heldout".
    concept: name that pairs with the same content share. Such pairs are in the same split.
    facts: facts about image and caption, if the source has facts (see docs/evaluation.md).
    added_crop: number of a random crop that `cm3leon prepare_data` added. "" for a whole image.
  """

  key: str
  image: str | bytes
  caption: str
  source: str = ""
  license: str = ""
  attribution: str = ""
  group: str = ""
  split: str = ""
  concept: str = ""
  facts: dict = dataclasses.field(default_factory=dict)
  added_crop: str = ""


@dataclasses.dataclass(frozen=True)
class RawText:
  """A text without images. The fields are as in `RawPair`."""

  key: str
  text: str
  source: str = ""
  license: str = ""
  attribution: str = ""
  split: str = ""


@dataclasses.dataclass(frozen=True)
class RawInterleaved:
  """Texts and images in reading order. The other fields are as in `RawPair`.

  Attributes:
    segments: at least one segment. A segment is {"text": str} or {"image": path or bytes}.
  """

  key: str
  segments: tuple[dict, ...]
  source: str = ""
  license: str = ""
  attribution: str = ""
  group: str = ""
  split: str = ""


Record = RawPair | RawText | RawInterleaved
T = TypeVar("T", bound=Record)
# Name of a kind -> class of its records. The file of a kind is NAME.jsonl.
KINDS: dict[str, type[Record]] = {"pairs": RawPair, "texts": RawText, "interleaved": RawInterleaved}


def images_of(record: Record) -> list[str | bytes]:
  """Returns the images of a record in reading order."""
  if isinstance(record, RawInterleaved):
    return [segment["image"] for segment in record.segments if "image" in segment]
  return [record.image] if isinstance(record, RawPair) else []


def with_images(record: T, images: Iterable[str | bytes]) -> T:
  """Replaces the images of a record in reading order."""
  images = iter(images)
  if isinstance(record, RawInterleaved):
    segments = tuple(
      {"image": next(images)} if "image" in segment else segment for segment in record.segments
    )
    return dataclasses.replace(record, segments=segments)
  return dataclasses.replace(record, image=next(images)) if isinstance(record, RawPair) else record


def batches(items: Iterable, count: int, size: int) -> Iterator[list]:
  """Yields batches. A batch ends after `count` items or after `size` bytes of images."""
  batch, total = [], 0
  for item in items:
    images = images_of(item) if isinstance(item, Record) else []
    batch.append(item)
    total += sum(len(image) for image in images if isinstance(image, bytes))
    if len(batch) == count or total >= size:
      yield batch
      batch, total = [], 0
  if batch:
    yield batch


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A rejected record, with its file, its key, the reason, and a message for the user."""

  file: str
  key: str
  reason: str
  message: str

  def __post_init__(self) -> None:
    object.__setattr__(self, "message", without_addresses(self.message))


class RecordError(ValueError):
  """Error in one record, with the reason and a message for the user."""

  def __init__(self, message: str, reason: str = "malformed_record"):
    super().__init__(without_addresses(message))
    self.reason = reason


def required_fields(cls: type) -> list[str]:
  """Returns the fields of a record type that have no default."""
  return [
    f.name
    for f in dataclasses.fields(cls)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
  ]


def make_record(cls: type[T], values: Mapping, where: str) -> T:
  """Builds a record of type `cls` from a mapping. Ignores unknown fields.

  Raises:
    RecordError: a field is missing, is empty, or has the wrong type. The message begins with
      `where`.
  """
  required = required_fields(cls)
  fields = [f.name for f in dataclasses.fields(cls)]
  values = {name: values[name] for name in fields if values.get(name) is not None}
  if isinstance(values.get("key"), str) and values["key"]:
    where = f"{where}, key '{values['key']}'"
  for name in required:
    if name not in values:
      raise RecordError(f"{where} has no field '{name}'; it must have {', '.join(required)}.")
  if "segments" in values:
    values["segments"] = _checked_segments(values["segments"], where)
  for name, value in values.items():
    if name != "segments":
      _check_value(name, value, name in required, where)
  if values.get("split", "train") not in ("", *SPLITS):
    raise RecordError(
      f"{where}: split is '{values['split']}'; it must be 'train', 'heldout' or 'bank', or absent."
    )
  return cls(**values)


def _check_value(name: str, value: Any, required: bool, where: str) -> None:
  if name == "image" and isinstance(value, bytes):
    return
  if name == "facts":
    if not isinstance(value, dict):
      raise RecordError(f"{where}: field 'facts' is {short(value)}; it must be a JSON object.")
  elif not isinstance(value, str):
    raise RecordError(f"{where}: field '{name}' is {short(value)}; it must be a string.")
  elif required and not value.strip():
    reason = f"empty_{name}" if name in ("caption", "text") else "malformed_record"
    message = f"{where}: field '{name}' is empty; give it a text, or remove the record."
    raise RecordError(message, reason)
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except (TypeError, ValueError, RecursionError) as error:  # For example, half a surrogate pair.
    raise RecordError(f"{where}: field '{name}' is not valid JSON ({error}).") from error


def _checked_segments(segments: Any, where: str) -> tuple[dict, ...]:
  if not isinstance(segments, list | tuple) or not segments:
    raise RecordError(f"{where}: 'segments' must be a list of texts and images, at least one.")
  for i, segment in enumerate(segments):
    if not isinstance(segment, dict) or list(segment) not in (["text"], ["image"]):
      raise RecordError(f'{where}: segment {i} must be {{"text": ...}} or {{"image": ...}}.')
    ((name, value),) = segment.items()
    _check_value(name, value, True, f"{where}, segment {i}")
  return tuple(segments)


def parse_json(line: str, where: str, required: list[str]) -> dict:
  """Parses a line of a JSONL file. Raises RecordError if the line is not a JSON object."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:  # A number of 5,000 digits also raises ValueError.
    raise RecordError(
      f"{where} is not valid JSON ({error}); every line must be one JSON object."
    ) from error
  if not isinstance(record, dict):
    kind = type(record).__name__
    fields = f", with {', '.join(required)}" if required else ""
    raise RecordError(f"{where} is {kind}; every line must be one JSON object{fields}.")
  return record


def renamed(values: dict) -> dict:
  """Adds the fields of ALIASES. A field gets the first of its aliases that is not None."""
  result = dict(values)
  for name, aliases in ALIASES.items():
    value = next((values[a] for a in aliases if values.get(a) is not None), None)
    if value is not None:
      result[name] = value
  return result


def checked_record(cls: type[Record], values: dict, file: str, where: str) -> Record | Rejected:
  """Builds a record of type `cls`. Returns `Rejected` if `values` are invalid."""
  try:
    return make_record(cls, values, where)
  except RecordError as error:
    return Rejected(file, str(key_of(values, "")), error.reason, str(error))


def key_of(values: Mapping, default: Any) -> Any:
  """Returns the key of a record as a text, or `default` if the key is None or ""."""
  key = values.get("key")
  if key is None or key == "":
    return default
  return key if isinstance(key, bool | list | dict) else str(key)


def origin_counts(origins: Iterable[dict]) -> list[dict]:
  """Counts the records of each origin. Keeps the MOST_ORIGINS most frequent origins.

  The remaining origins are merged by kind and license. An origin is a dict of `ORIGIN_FIELDS` and
  "records", the number of its records.
  """
  counts: collections.Counter[tuple] = collections.Counter()
  for origin in origins:
    counts[tuple(origin[field] for field in ORIGIN_FIELDS)] += origin["records"]
  kept = counts.most_common(MOST_ORIGINS)
  others: collections.Counter[tuple] = collections.Counter()
  for (kind, _, license_, _), records in counts.most_common()[MOST_ORIGINS:]:
    others[kind, "others", license_, "others"] += records
  return [
    {**dict(zip(ORIGIN_FIELDS, origin)), "records": records}
    for origin, records in [*kept, *others.most_common()]
  ]
