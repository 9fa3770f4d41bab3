"""Reads JSON lines, CSV rows and texts of a source."""

from collections.abc import Iterator
import csv
import io
from typing import IO

from etils import epath
import fsspec

from cm3leon_jax.data.sources.records import RecordError, Rejected, parse_json

MAX_FIELD = 2**20  # Maximum number of characters of a CSV field. Python's default is 2**17.


def numbered_lines(raw: IO[bytes], file: object) -> Iterator[tuple[str, bytes]]:
  """Yields (place, line) for each line that is not blank, e.g. ("a.jsonl, line 1", b"{}")."""
  # Without a buffer, each line of a file in a GCS bucket would copy a block of 5 MiB.
  with io.BufferedReader(raw) as stream:  # type: ignore[type-var]  # It has the needed methods.
    for number, line in enumerate(stream, 1):
      if line.strip():
        yield f"{file}, line {number}", line


def file_lines(file: epath.PathLike) -> Iterator[tuple[str, bytes]]:
  """Yields the `numbered_lines` of a file."""
  with epath.Path(file).open("rb") as stream:
    yield from numbered_lines(stream, file)


def json_lines(
  fs: fsspec.AbstractFileSystem, file: str, fields: list[str]
) -> Iterator[tuple[str, dict | Rejected]]:
  """Yields (place, values) for each line of a JSONL file, with `Rejected` for an invalid line.

  Skips blank lines. Error messages name `fields`, which every line must have.
  """
  with fs.open(file, "rb") as stream:
    for where, line in numbered_lines(stream, file):
      try:
        yield where, parse_json(decode(line, where), where, fields)
      except RecordError as error:
        yield where, Rejected(file, "", error.reason, str(error))


def decode(data: bytes, where: str) -> str:
  """Decodes a text. Raises RecordError if it is not UTF-8."""
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise RecordError(f"{where} is not UTF-8 ({error}); save it as UTF-8.") from error


def csv_rows(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[tuple[str, dict | Rejected]]:
  """Yields (place, fields) for each row. Ends with a `Rejected` at the first invalid row."""
  csv.field_size_limit(MAX_FIELD)
  with fs.open(file, "rt", encoding="utf-8-sig", newline="") as stream:
    rows = csv.DictReader(stream, strict=True)  # `strict` makes an unclosed quote an error.
    try:
      for row in rows:
        yield f"{file}, line {rows.line_num}", {k: v for k, v in row.items() if k is not None}
    except (csv.Error, UnicodeDecodeError) as error:
      where = f"{file}, line {rows.line_num + 1}"
      message = f"{where} and later lines are not CSV in UTF-8 ({error}): fix them and run again."
      yield where, Rejected(file, "", "unreadable_file", message)
