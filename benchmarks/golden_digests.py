"""Computes digests of the results of a run, without values that differ from run to run."""

from collections.abc import Iterator
import hashlib
import json
import os
import pathlib
import re
from typing import Any

# Files that are not compared: pages for people, and files with times or names of machines.
# Checkpoints are not compared because exports, later losses and samples depend on their parameters.
TEXTS = (".md", ".html", ".log", ".txt")
SKIPPED_FILES = (
  *("contact_sheet.png", "digests.json", "export.json", "lease.json", "metrics.digest.json"),
  *("metrics.jsonl", "plan.jsonl", "summary.json", "train/config.json"),
)
SKIPPED_FOLDERS = ("checkpoints", "checkpoints.digests", "logs", "params", "state")
# Suffix in the folder names of samples: a digest of their inputs, which include ids of stages.
OF_ITS_RUN = re.compile(r"-[0-9a-f]{8}(?=/)")
# Fields of JSON files with times, machines, names of config fields, or ids of stages. Some ids
# depend on the time.
VOLATILE = ("config", "id", "inputs", "seconds", "time")
# Files in which no field is omitted, because their ids are token ids.
VERBATIM = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def of_file(path: pathlib.Path) -> str:
  """Returns the digest of a file; omits VOLATILE fields of JSON and JSON lines."""
  if path.suffix == ".json" and path.name not in VERBATIM:
    return of_value(json.loads(path.read_text()))
  if path.suffix == ".jsonl":
    return of_value([json.loads(line) for line in path.read_text().splitlines()])
  return hashlib.sha256(path.read_bytes()).hexdigest()


def of_value(value: Any) -> str:
  """Returns the digest of a JSON value without VOLATILE fields."""
  text = json.dumps(_stable(value), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def of_folder(folder: pathlib.Path) -> dict[str, str]:
  """Returns the digests of all files in a folder and its subfolders: relative name -> digest."""
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
