"""Tests the readers of untrusted files with random inputs, guided by coverage, until a time limit.

  pip install -e '.[fuzz]'
  python -m benchmarks.fuzz_records tar -max_total_time=600

Readers: csv, json, tar, yaml. All other arguments are passed to libFuzzer, e.g. a folder of initial
files. An exception that the readers do not handle ends the fuzzing, and the input is written to
`crash-*`. Add this input to tests/data/sources/archive_bounds_test.py or
tests/commands/untrusted_test.py.
"""

import contextlib
import json
import sys

import atheris
import fsspec

with atheris.instrument_imports(include=["cm3leon_jax", "csv", "json", "tarfile", "yaml"]):
  from cm3leon_jax.config import UserError
  from cm3leon_jax.data.instructions.task_files import parse_tasks
  from cm3leon_jax.data.sources import archives, lines, records

FILES = fsspec.filesystem("memory")
FILE = "/file"


def read_csv() -> None:
  for where, values in lines.csv_rows(FILES, FILE):
    check(where, values)


def read_json() -> None:
  for where, values in lines.json_lines(FILES, FILE, []):
    check(where, values)


def read_tar() -> None:
  for item in archives.tar_samples(FILES, FILE, lambda item, *_: item):
    assert isinstance(item, records.Record | records.Rejected)


def read_yaml() -> None:
  with contextlib.suppress(UserError, UnicodeDecodeError):
    parse_tasks(FILES.cat_file(FILE).decode(), FILE)


def check(where: str, values: dict | records.Rejected) -> None:
  """Converts values to records of each kind and serializes the valid ones, as ingestion does."""
  if isinstance(values, records.Rejected):
    return
  for kind in records.KINDS.values():
    item = records.checked_record(kind, records.renamed(values), FILE, where)
    if not isinstance(item, records.Rejected):
      json.dumps(vars(item), ensure_ascii=False).encode()


READERS = {"csv": read_csv, "json": read_json, "tar": read_tar, "yaml": read_yaml}


def main() -> None:
  read = READERS[sys.argv.pop(1)]

  def once(data: bytes) -> None:
    FILES.pipe_file(FILE, data)
    read()

  atheris.Setup(sys.argv, once)
  atheris.Fuzz()


if __name__ == "__main__":
  main()
