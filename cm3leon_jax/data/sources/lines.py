"""Reads JSON lines, CSV rows and texts of a source. Limits the length of each."""

from collections.abc import Iterator
import csv
import io
import itertools
from typing import IO, Self, TextIO

from etils import epath
import fsspec

from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources.records import RecordError, Rejected, parse_json

MAX_LINE = 2**24  # Maximum size of a JSON line or a text file, in bytes.
MAX_ROW = 2**20  # Maximum number of characters of a CSV row.


def bounded_lines(raw: IO[bytes], file: object) -> Iterator[tuple[str, bytes | RecordError]]:
  """Yields (place, line) for each line of a binary file that is not blank.

  Yields a `RecordError` in place of a line with more than MAX_LINE bytes. Never reads such a line
  into memory as a whole. Closes the file at the end.
  """
  # Files in a GCS bucket ignore the size limit of `readline`.
  with io.BufferedReader(raw) as stream:  # type: ignore[type-var]  # It has the needed methods.
    for number in itertools.count(1):
      line = stream.readline(MAX_LINE + 1)
      if not line:
        return
      where = f"{file}, line {number}"
      if len(line) > MAX_LINE:
        while line and not line.endswith(b"\n"):
          line = stream.readline(MAX_LINE)
        message = f"{where} has more than {MAX_LINE:,} bytes; it must be one JSON object."
        yield where, RecordError(message)
      elif line.strip():
        yield where, line


def strict_lines(file: epath.PathLike) -> Iterator[tuple[str, bytes]]:
  """Yields (place, line) as `bounded_lines` does. Raises UserError if a line is too long."""
  with epath.Path(file).open("rb") as raw:
    for where, line in bounded_lines(raw, file):
      if isinstance(line, RecordError):
        raise UserError(str(line))
      yield where, line


def json_lines(
  fs: fsspec.AbstractFileSystem, file: str, fields: list[str]
) -> Iterator[tuple[str, dict | Rejected]]:
  """Yields (place, values) for each line of a JSONL file, with `Rejected` for an invalid line.

  Skips blank lines. Error messages name `fields`, which every line must have.
  """
  with fs.open(file, "rb") as raw:
    for where, line in bounded_lines(raw, file):
      try:
        if isinstance(line, RecordError):
          raise line
        yield where, parse_json(_decode(line, where), where, fields)
      except RecordError as error:
        yield where, Rejected(file, "", error.reason, str(error))


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise RecordError(f"{where} is not UTF-8 ({error}); save it as UTF-8.") from error


class _RowLines:
  """Iterates over the lines of a CSV file. Raises csv.Error if a row exceeds MAX_ROW characters.

  Attributes:
    used: number of characters of the current row. The caller sets it to 0 when a row ends.
  """

  def __init__(self, stream: TextIO) -> None:
    self._stream, self.used = stream, 0

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> str:
    line = self._stream.readline(MAX_ROW + 1)
    self.used += len(line)
    if self.used > MAX_ROW:
      raise csv.Error(f"a row of more than {MAX_ROW:,} characters")
    if not line:
      raise StopIteration
    return line


def csv_rows(fs: fsspec.AbstractFileSystem, file: str) -> Iterator[tuple[str, dict | Rejected]]:
  """Yields (place, fields) for each row. Ends with a `Rejected` at the first invalid row."""
  csv.field_size_limit(MAX_ROW)
  with fs.open(file, "rt", encoding="utf-8-sig", newline="") as stream:
    lines = _RowLines(stream)
    rows = csv.DictReader(lines, strict=True)  # `strict` makes an unclosed quote an error.
    try:
      for row in rows:
        lines.used = 0
        yield f"{file}, line {rows.line_num}", {k: v for k, v in row.items() if k is not None}
    except (csv.Error, UnicodeDecodeError) as error:
      where = f"{file}, line {rows.line_num + 1}"
      message = f"{where} and later lines are not CSV in UTF-8 ({error}): fix them and run again."
      yield where, Rejected(file, "", "unreadable_file", message)


def whole_file(fs: fsspec.AbstractFileSystem, file: str) -> bytes:
  """Reads a file. Raises RecordError if the file has more than MAX_LINE bytes."""
  with fs.open(file, "rb") as stream:
    data = stream.read(MAX_LINE + 1)
  if len(data) > MAX_LINE:
    raise RecordError(
      f"{file} has more than {MAX_LINE:,} bytes: split it, or convert it to JSON lines."
    )
  return data


def whole_text(fs: fsspec.AbstractFileSystem, file: str) -> str:
  """Reads a text file. Raises RecordError if the file is too long or is not UTF-8."""
  return _decode(whole_file(fs, file), file)
