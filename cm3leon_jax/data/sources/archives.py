"""Reads records from archives: WebDataset tars and Parquet files."""

from collections.abc import Callable, Iterator
import dataclasses
import io
import itertools
import posixpath
import shutil
import tarfile
from typing import IO, Any

import fsspec

from cm3leon_jax import extras
from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources.records import (
  ALIASES,
  RawPair,
  RawText,
  Record,
  Rejected,
  checked_record,
  key_of,
  long_caption,
  renamed,
)
from cm3leon_jax.data.sources.samples import SAMPLE_SUFFIXES, sample_records

MAX_MEMBER = 2**26  # Maximum size of a file in a tar, in bytes.
MAX_HEADER = 2**20  # Maximum size of a header in a tar, in bytes.
MAX_GROUP = 2**30  # Maximum size in bytes of the columns that are read in a Parquet row group.
PARQUET_BUFFER = 2**20
# Names of the Parquet columns that are read.
NAMES = {*ALIASES, *itertools.chain(*ALIASES.values())}
NAMES |= {field.name for cls in (RawPair, RawText) for field in dataclasses.fields(cls)}


class _Bounded:
  """File object for `tarfile`. Rejects huge headers, because `tarfile` reads whole headers."""

  def __init__(self, stream: IO[bytes]) -> None:
    self._stream = stream
    self.seek, self.tell = stream.seek, stream.tell

  def read(self, size: int) -> bytes:
    if size > MAX_HEADER + tarfile.BLOCKSIZE:
      raise tarfile.HeaderError(f"a header has {size:,} bytes; the maximum is {MAX_HEADER:,}")
    return self._stream.read(size)


def tar_samples(
  fs: fsspec.AbstractFileSystem, file: str, images: Callable
) -> Iterator[Record | Rejected]:
  """Yields the samples of an img2dataset tar: images and captions whose names have equal stems."""
  del images  # Not needed, because the images are in the tar.
  try:
    # "r:" rejects compressed tars, because a small file could become a thousand times as large.
    with (
      fs.open(file, "rb") as stream,
      # tarfile calls only `seek`, `tell` and `read`.
      tarfile.open(fileobj=_Bounded(stream), mode="r:") as tar,  # type: ignore[call-overload]
    ):
      stem = ""
      sample: dict[str, bytes] = {}
      for member in tar:
        member.pax_headers = {}  # Saves memory: the tar object keeps all members.
        if not member.isfile():
          continue
        folder, name = posixpath.split(member.name)
        base, _, suffix = name.partition(".")
        suffix = suffix.lower()
        if posixpath.join(folder, base) != stem:
          yield from _sample(file, stem, sample)
          stem, sample = posixpath.join(folder, base), {}
        if member.size > MAX_MEMBER:
          message = (
            f"{file}, {member.name} has {member.size:,} bytes; the maximum is {MAX_MEMBER:,}."
          )
          yield Rejected(file, stem, "large_file", message)
        elif suffix in SAMPLE_SUFFIXES:
          buffer = io.BytesIO()
          shutil.copyfileobj(tar.extractfile(member), buffer, MAX_HEADER)
          sample[suffix] = buffer.getvalue()
      yield from _sample(file, stem, sample)
  except Exception as error:  # tarfile raises many kinds of errors for invalid headers.
    message = (
      f"{file} cannot be read to its end ({error}); it must be a complete, uncompressed tar file."
    )
    yield Rejected(file, "", "unreadable_file", message)


def _sample(file: str, stem: str, sample: dict[str, bytes]) -> Iterator[Record | Rejected]:
  if sample:
    yield from sample_records(file, f"{file}, sample '{stem}'", stem, sample, source=file)


def parquet_rows(
  fs: fsspec.AbstractFileSystem, file: str, images: Callable, longest_caption: int | None = None
) -> Iterator[Record | Rejected]:
  """Yields the records of a Parquet file: a pair for a row with an image, otherwise a text.

  An image is bytes, a path, or a dict of both (Hugging Face). MAX_GROUP also limits the values that
  are read from the rows, because a Parquet dictionary can repeat a large value in all rows.
  `images` checks image paths and makes them absolute, see `formats._with_images`. Captions of more
  than `longest_caption` characters are rejected before they are decoded. None allows any length.
  """
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f"{file} needs pyarrow ({error}): {extras.install('data')}.") from error
  try:
    with fs.open(file, "rb") as stream:
      # Without these options, pyarrow would read a whole row group into memory.
      table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=PARQUET_BUFFER)
      number = 0
      for group in range(table.num_row_groups):
        columns, size, rows = _columns(table.metadata.row_group(group))
        if size > MAX_GROUP:
          message = (
            f"{file}, the {rows} rows from {number} on have {size:,} bytes; the maximum of a row "
            f"group is {MAX_GROUP:,}: write smaller row groups."
          )
          yield Rejected(file, str(number), "large_file", message)
          number += rows
          continue
        end, total = number + rows, 0
        # One row at a time, because a dictionary repeats its full value in every row.
        for batch in table.iter_batches(1, row_groups=[group], columns=columns):
          row = {
            name: column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
            for name, column in zip(batch.schema.names, batch.columns)
          }
          total += sum(column.nbytes for column in row.values())
          if total > MAX_GROUP:
            message = (
              f"{file}, the {end - number} rows from {number} on are not read: the values of their "
              f"row group have more than {MAX_GROUP:,} bytes: write smaller row groups."
            )
            yield Rejected(file, str(number), "large_file", message)
            break
          yield _row(row, file, number, images, longest_caption)
          number += 1
        number = end
  except Exception as error:  # pyarrow raises many kinds of errors for damaged files.
    message = f"{file} cannot be read to its end ({error}); it must be a Parquet file."
    yield Rejected(file, "", "unreadable_file", message)


def _columns(group: Any) -> tuple[list[str], int, int]:
  """Returns the columns of a row group that records need, their bytes, and the number of rows."""
  columns, size = [], 0
  for i in range(group.num_columns):
    column = group.column(i)
    name, _, inner = column.path_in_schema.partition(".")
    # Skip nested lists, because a list in one row could have any length.
    if name == "facts" or (name in NAMES and inner in ("", "bytes", "path")):
      columns.append(column.path_in_schema)
      size += column.total_uncompressed_size
  return columns, size, group.num_rows


def _row(
  columns: dict, file: str, number: int, images: Callable, longest_caption: int | None
) -> Record | Rejected:
  """Builds the record of a row. Each column has one value."""
  where = f"{file}, row {number}"
  long = {} if longest_caption is None else _long_captions(columns, longest_caption)
  try:
    row = {name: column[0].as_py() for name, column in columns.items() if name not in long}
    values = renamed(row)
    image = values.get("image")
    if isinstance(image, dict):
      image = image.get("bytes") or image.get("path")
    values |= {"image": image, "key": key_of(values, f"{posixpath.basename(file)}/{number}")}
    values = {name: value for name, value in values.items() if value is not None}
    if long and longest_caption is not None and "image" in values:
      names = (name for name in ALIASES["caption"] if name in long or row.get(name) is not None)
      if (name := next(names)) in long:
        key = str(values["key"])
        message = long_caption(key, long[name], longest_caption)
        return Rejected(file, key, "long_caption", message)
    elif "text" in long:
      row["text"] = columns["text"][0].as_py()
  except Exception as error:  # For example, text that is not UTF-8, or a date out of range.
    return Rejected(file, str(number), "malformed_record", f"{where} cannot be read ({error}).")
  if "image" not in values and isinstance(row.get("text"), str):
    return checked_record(RawText, {**values, "text": row["text"]}, file, where)
  return images(checked_record(RawPair, values, file, where), posixpath.dirname(file), where)


def _long_captions(columns: dict, longest: int) -> dict[str, int]:
  """Returns the number of characters of each caption longer than `longest`, by column."""
  import pyarrow as pa
  from pyarrow import compute

  lengths = {
    name: compute.utf8_length(columns[name])[0].as_py() or 0
    for name in ALIASES["caption"]
    if name in columns
    if pa.types.is_string(columns[name].type) or pa.types.is_large_string(columns[name].type)
  }
  return {name: length for name, length in lengths.items() if length > longest}
