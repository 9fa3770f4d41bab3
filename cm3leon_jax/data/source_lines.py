"""Reads lines of JSON, rows of CSV and texts of a source, of bounded length."""

import codecs
from collections.abc import Iterator
import csv
import itertools

from cm3leon_jax.data.records import RecordError, Rejected, parse_json, required_fields

MAX_LINE = 2**24  # Bytes of a line of JSON, of a text file, or of a field of CSV.


def json_lines(fs, file: str, cls) -> Iterator[tuple[str, dict | Rejected]]:
  """Yields (where, fields) for every line of a JSONL file that is not blank."""
  with fs.open(file, "rb") as stream:
    for number in itertools.count(1):
      line = stream.readline(MAX_LINE + 1)
      if not line:
        return
      where = f"{file}, line {number}"
      try:
        if len(line) > MAX_LINE:
          while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)
          message = f"{where} has more than {MAX_LINE:,} bytes; it must be one JSON object."
          raise RecordError("malformed_record", message)
        if line.strip():
          text = _decode(line.removeprefix(codecs.BOM_UTF8), where)
          yield where, parse_json(text, where, required_fields(cls))
      except RecordError as error:
        yield where, Rejected(file, "", error.reason, str(error))


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise RecordError(
      "malformed_record", f"{where} is not UTF-8 ({error}); save it as UTF-8."
    ) from error


def csv_rows(fs, file: str) -> Iterator[tuple[str, dict | Rejected]]:
  """Yields (where, fields) for every row; ends at the first thing that is no CSV."""
  csv.field_size_limit(MAX_LINE)
  with fs.open(file, "rt", encoding="utf-8-sig", newline="") as stream:
    try:
      rows = csv.DictReader(stream, strict=True)  # A quote without an end is an error.
      for row in rows:
        yield f"{file}, line {rows.line_num}", {k: v for k, v in row.items() if k is not None}
    except (csv.Error, UnicodeDecodeError) as error:
      where = f"{file}, line {rows.line_num + 1}"
      message = f"{where} and what follows is no CSV in UTF-8 ({error}): mend it, and run again."
      yield where, Rejected(file, "", "unreadable_file", message)


def whole_text(fs, file: str) -> str:
  """Reads a text file; raises RecordError if it is not UTF-8, or has more than MAX_LINE bytes."""
  with fs.open(file, "rb") as stream:
    data = stream.read(MAX_LINE + 1)
  if len(data) > MAX_LINE:
    message = f"{file} has more than {MAX_LINE:,} bytes: split it, or give it as JSON lines."
    raise RecordError("malformed_record", message)
  return _decode(data, file)
