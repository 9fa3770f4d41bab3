"""Digests of what a run has written, without what differs between two runs of the same code."""

from collections.abc import Iterator
import hashlib
import json
import os
import pathlib
import re
from typing import Any

# Files for people, and files with times and machines in them; losses are compared by themselves.
# Exports, losses of later steps, and samples compare the parameters that Orbax has written.
TEXTS = (".md", ".html", ".log", ".txt")
SKIPPED_FILES = (
  *("config.json", "contact_sheet.png", "digests.json", "export.json", "lease.json"),
  *("metrics.digest.json", "metrics.jsonl", "plan.jsonl", "summary.json"),
)
SKIPPED_FOLDERS = ("checkpoints", "checkpoints.digests", "logs", "params", "state")
OF_ITS_RUN = re.compile(
  r"-[0-9a-f]{8}(?=/)"
)  # In the name of a folder of samples: a digest of ids.
# Fields of JSON files that hold times, machines, or names of fields of the config.
VOLATILE = ("config", "id", "inputs", "seconds", "time")


def of_file(path: pathlib.Path) -> str:
  """Returns the digest of a file; of JSON and JSON lines without VOLATILE fields."""
  if path.suffix == ".json":
    return of_value(json.loads(path.read_text()))
  if path.suffix == ".jsonl":
    return of_value([json.loads(line) for line in path.read_text().splitlines()])
  return hashlib.sha256(path.read_bytes()).hexdigest()


def of_value(value: Any) -> str:
  """Returns the digest of a JSON value without VOLATILE fields."""
  text = json.dumps(_stable(value), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def of_folder(folder: pathlib.Path) -> dict[str, str]:
  """Returns name in the folder -> digest of its files, in subfolders, too."""
  names = {path: os.fspath(path.relative_to(folder)) for path in _files(folder)}
  return {OF_ITS_RUN.sub("", name): of_file(path) for path, name in names.items()}


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      if path.name not in SKIPPED_FOLDERS:
        yield from _files(path)
    elif path.suffix not in TEXTS and path.name not in SKIPPED_FILES:
      yield path


def _stable(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _stable(v) for k, v in value.items() if not _is_volatile(k)}
  return [_stable(v) for v in value] if isinstance(value, list) else value


def _is_volatile(name: str) -> bool:
  return name in VOLATILE or name.endswith("_seconds") or name.startswith("seconds_")
