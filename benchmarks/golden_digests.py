"""Computes digests of the results of a run, without values that differ from run to run."""

from collections.abc import Iterator
import hashlib
import json
import os
import pathlib
import re
from typing import Any

# Not compared: texts for people, and files that contain times or names of machines. Checkpoints
# need not be compared: differing parameters change exports, later losses and samples.
TEXTS = (".md", ".html", ".log", ".txt")
SKIPPED_FILES = (
  *("contact_sheet.png", "digests.json", "export.json", "lease.json", "metrics.digest.json"),
  *("metrics.jsonl", "plan.jsonl", "summary.json", "train/config.json"),
)
SKIPPED_FOLDERS = ("checkpoints", "checkpoints.digests", "logs", "params", "state")
# Suffix of the folders of samples: a digest of the inputs, which include ids of stages.
OF_ITS_RUN = re.compile(r"-[0-9a-f]{8}(?=/)")
# JSON fields that contain times, machines, names of config fields, or ids of stages (some of these
# ids depend on the time).
VOLATILE = ("config", "id", "inputs", "seconds", "time")
# Files in which no field is omitted: their "id" fields contain token ids.
VERBATIM = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def of_file(path: pathlib.Path) -> str:
  """Returns the digest of a file; omits the fields VOLATILE of JSON and JSONL files."""
  if path.suffix == ".json" and path.name not in VERBATIM:
    return of_value(json.loads(path.read_text()))
  if path.suffix == ".jsonl":
    return of_value([json.loads(line) for line in path.read_text().splitlines()])
  return hashlib.sha256(path.read_bytes()).hexdigest()


def of_value(value: Any) -> str:
  """Returns the digest of a JSON value without the fields VOLATILE."""
  text = json.dumps(_stable(value), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def of_folder(folder: pathlib.Path) -> dict[str, str]:
  """Returns relative path -> digest, for the compared files in a folder and its subfolders."""
  names = {path: os.fspath(path.relative_to(folder)) for path in _files(folder)}
  return {OF_ITS_RUN.sub("", name): of_file(path) for path, name in names.items()}


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      if path.name not in SKIPPED_FOLDERS:
        yield from _files(path)
    elif path.suffix not in TEXTS and not path.as_posix().endswith(SKIPPED_FILES):
      yield path


def _stable(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _stable(v) for k, v in value.items() if not _is_volatile(k)}
  return [_stable(v) for v in value] if isinstance(value, list) else value


def _is_volatile(name: str) -> bool:
  return name in VOLATILE or name.endswith("_seconds") or name.startswith("seconds_")
