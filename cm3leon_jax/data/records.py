"""Raw records, before tokenization: captioned images, texts, and what was rejected of them."""

from collections.abc import Mapping
import dataclasses
import json

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class RawPair:
  """A captioned image.

  Attributes:
    key: unique in its folder.
    image: path of the file (absolute once read, relative to the folder in pairs.jsonl), or the file's bytes.
    group: near-duplicates share one and are never one another's neighbours. Empty: none.
    split: "train" or "heldout".
    concept: what is shown; a concept lies wholly in one split.
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


@dataclasses.dataclass(frozen=True)
class RawText:
  """A text without images; fields as in RawPair."""

  key: str
  text: str
  source: str = ""
  license: str = ""
  attribution: str = ""
  split: str = ""


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A record that was left out: `file` and `key` say which, `reason` is a word to count by, `message` a sentence."""

  file: str
  key: str
  reason: str
  message: str


class RecordError(ValueError):
  """What is wrong with one record, in one sentence, and a word for the kind of fault."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


def required_fields(cls) -> list[str]:
  return [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]


def make_record(cls: type, values: Mapping, where: str):
  """A RawPair or RawText from a mapping; fields that `cls` does not have are ignored.

  Raises:
    RecordError: a field is absent, empty, or no text; `where` names the record in the sentence.
  """
  required = required_fields(cls)
  values = {f.name: values[f.name] for f in dataclasses.fields(cls) if values.get(f.name) is not None}
  if isinstance(values.get("key"), str) and values["key"]:
    where = f"{where}, key '{values['key']}'"
  for name in required:
    if name not in values:
      raise RecordError("malformed_record", f"{where} has no field '{name}'; it must have {', '.join(required)}.")
  for name, value in values.items():
    if name == "image" and isinstance(value, bytes):
      continue
    if not isinstance(value, str):
      raise RecordError("malformed_record", f"{where}: field '{name}' is {json.dumps(value)}; it must be a string.")
    if name in required and not value.strip():
      reason = f"empty_{name}" if name in ("caption", "text") else "malformed_record"
      raise RecordError(reason, f"{where}: field '{name}' is empty; give it a text, or leave the record out.")
    if any("\ud800" <= c <= "\udfff" for c in value):
      raise RecordError(
        "malformed_record", f"{where}: field '{name}' holds half of a surrogate pair; it must be valid Unicode."
      )
  if values.get("split", "train") not in ("", *SPLITS):
    message = f"{where}: split is '{values['split']}'; it must be 'train' or 'heldout', or be left out."
    raise RecordError("malformed_record", message)
  return cls(**values)


def parse_json(line: str, where: str, required: list[str]) -> dict:
  """One line of a JSONL file. Raises RecordError if it is no JSON object."""
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    message = f"{where} is no valid JSON ({error}); every line must be one JSON object."
    raise RecordError("malformed_record", message) from error
  if not isinstance(record, dict):
    kind = type(record).__name__
    raise RecordError("malformed_record", f"{where} is {kind}; every line must be one JSON object, with {', '.join(required)}.")
  return record
