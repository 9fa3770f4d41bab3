"""Reads lines of JSON, rows of CSV and texts of a source, of bounded length."""

from collections.abc import Iterator
import csv
import io
import itertools
from typing import IO, Self, TextIO

from etils import epath
import fsspec

from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources.records import RecordError, Rejected, parse_json

MAX_LINE = 2**24  # Bytes of a line of JSON, or of a text file.
MAX_ROW = 2**20  # Characters of a row of CSV, which may have half as many fields.


def bounded_lines(raw: IO[bytes], file: object) -> Iterator[tuple[str, bytes | RecordError]]:
  """Yields (where, line) for every line of a binary file that is not blank.

  Args:
    raw: the file; it is closed at its end.
    file: its name, for `where` and messages.

  Yields:
    Of a line of more than MAX_LINE bytes, which is never in memory whole, the error that says so.
  """
  # Files of a bucket have a `readline` without a limit.
  with io.BufferedReader(raw) as stream:  # type: ignore[type-var]  # Any binary file has what it calls.
    for number in itertools.count(1):
      line = stream.readline(MAX_LINE + 1)
      if not line:
        return
      where = f"{file}, line {number}"
      if len(line) > MAX_LINE:
        while line and not line.endswith(b"\n"):
          line = stream.readline(MAX_LINE)
        message = f"{where} has more than {MAX_LINE:,} bytes; it must be one JSON object."
        yield where, RecordError("malformed_record", message)
      elif line.strip():
        yield where, line


def strict_lines(file: epath.PathLike) -> Iterator[tuple[str, bytes]]:
  """Yields (where, line) as `bounded_lines`; raises UserError at a line that is too long."""
  with epath.Path(file).open("rb") as raw:
    for where, line in bounded_lines(raw, file):
      if isinstance(line, RecordError):
        raise UserError(str(line))
      yield where, line


def json_lines(
  fs: fsspec.AbstractFileSystem, file: str, fields: list[str]
) -> Iterator[tuple[str, dict | Rejected]]:
  """Yields (where, values) of every line of a JSONL file that is not blank.

  Args:
    fs: filesystem of the file.
    file: its path.
    fields: names of fields that a line must have; for messages.
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
    raise RecordError(
      "malformed_record", f"{where} is not UTF-8 ({error}); save it as UTF-8."
    ) from error


class _RowLines:
  """Lines of a CSV file; raises csv.Error where those of one row have more than MAX_ROW characters.

  Attributes:
    used: characters of the lines since it was set to 0.
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
  """Yields (where, fields) for every row; ends at the first thing that is no CSV."""
  csv.field_size_limit(MAX_ROW)
  with fs.open(file, "rt", encoding="utf-8-sig", newline="") as stream:
    lines = _RowLines(stream)
    rows = csv.DictReader(lines, strict=True)  # A quote without an end is an error.
    try:
      for row in rows:
        lines.used = 0
        yield f"{file}, line {rows.line_num}", {k: v for k, v in row.items() if k is not None}
    except (csv.Error, UnicodeDecodeError) as error:
      where = f"{file}, line {rows.line_num + 1}"
      message = f"{where} and what follows is no CSV in UTF-8 ({error}): mend it, and run again."
      yield where, Rejected(file, "", "unreadable_file", message)


def whole_file(fs: fsspec.AbstractFileSystem, file: str) -> bytes:
  """Reads a file; raises RecordError if it has more than MAX_LINE bytes."""
  with fs.open(file, "rb") as stream:
    data = stream.read(MAX_LINE + 1)
  if len(data) > MAX_LINE:
    message = f"{file} has more than {MAX_LINE:,} bytes: split it, or give it as JSON lines."
    raise RecordError("malformed_record", message)
  return data


def whole_text(fs: fsspec.AbstractFileSystem, file: str) -> str:
  """Reads a text file; raises RecordError as `whole_file`, or if it is not UTF-8."""
  return _decode(whole_file(fs, file), file)
