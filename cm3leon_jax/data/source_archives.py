"""Reads records from archives: tars of WebDataset, and Parquet files."""

from collections.abc import Callable, Iterator
import dataclasses
import io
import itertools
import posixpath
import shutil
import tarfile

from cm3leon_jax.config import UserError
from cm3leon_jax.data.records import (
  ALIASES,
  RawPair,
  RawText,
  Record,
  Rejected,
  checked_record,
  key_of,
  renamed,
)
from cm3leon_jax.data.source_samples import SAMPLE_SUFFIXES, sample_records

MAX_MEMBER = 2**26  # Bytes of a file in a tar.
MAX_HEADER = 2**20  # Bytes of a header in a tar.
MAX_GROUP = 2**30  # Bytes of a group of rows in Parquet, of the columns that are read.
PARQUET_BUFFER = 2**20
# Columns of Parquet that are read.
NAMES = {*ALIASES, *itertools.chain(*ALIASES.values())}
NAMES |= {field.name for cls in (RawPair, RawText) for field in dataclasses.fields(cls)}


class _Bounded:
  """A file for `tarfile`, which reads a header at once, whatever its size: that is refused."""

  def __init__(self, stream):
    self._stream = stream
    self.seek, self.tell = stream.seek, stream.tell

  def read(self, size: int) -> bytes:
    if size > MAX_HEADER + tarfile.BLOCKSIZE:
      raise tarfile.HeaderError(f"a header of {size:,} bytes; it may have {MAX_HEADER:,}")
    return self._stream.read(size)


def tar_samples(fs, file: str, images: Callable) -> Iterator[Record | Rejected]:
  """Yields the samples of a tar by img2dataset: an image and its captions, of one stem."""
  del images  # They are in the tar.
  try:
    # "r:": a compressed tar could be a thousand times as large as its file.
    with fs.open(file, "rb") as stream, tarfile.open(fileobj=_Bounded(stream), mode="r:") as tar:
      stem, sample = "", {}
      for member in tar:
        member.pax_headers = {}  # The tar keeps all members.
        if not member.isfile():
          continue
        folder, name = posixpath.split(member.name)
        base, _, suffix = name.partition(".")
        suffix = suffix.lower()
        if posixpath.join(folder, base) != stem:
          yield from _sample(file, stem, sample)
          stem, sample = posixpath.join(folder, base), {}
        if member.size > MAX_MEMBER:
          message = f"{file}, {member.name} has {member.size:,} bytes; it may have {MAX_MEMBER:,}."
          yield Rejected(file, stem, "large_file", message)
        elif suffix in SAMPLE_SUFFIXES:
          buffer = io.BytesIO()
          shutil.copyfileobj(tar.extractfile(member), buffer, MAX_HEADER)
          sample[suffix] = buffer.getvalue()
      yield from _sample(file, stem, sample)
  except Exception as error:  # tarfile raises errors of any kind at wrong headers.
    message = (
      f"{file} cannot be read to its end ({error}); it must be a whole tar file, not compressed."
    )
    yield Rejected(file, "", "unreadable_file", message)


def _sample(file: str, stem: str, sample: dict[str, bytes]) -> Iterator[Record | Rejected]:
  if sample:
    yield from sample_records(file, f"{file}, sample '{stem}'", stem, sample, source=file)


def parquet_rows(fs, file: str, images: Callable) -> Iterator[Record | Rejected]:
  """Yields rows with a caption and an image: bytes, a path, or a dict of both (Hugging Face)."""
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f"{file} needs pyarrow ({error}): pip install -e '.[data]'.") from error
  try:
    with fs.open(file, "rb") as stream:
      # Without these options pyarrow reads a whole group of rows at once.
      table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=PARQUET_BUFFER)
      number = 0
      for group in range(table.num_row_groups):
        columns, size, rows = _columns(table.metadata.row_group(group))
        if size > MAX_GROUP:
          message = (
            f"{file}, the {rows} rows from {number} on have {size:,} bytes; a group may have "
            f"{MAX_GROUP:,}: write smaller groups of rows."
          )
          yield Rejected(file, str(number), "large_file", message)
          number += rows
          continue
        # One row: a value that a dictionary repeats is as large in each.
        for batch in table.iter_batches(1, row_groups=[group], columns=columns):
          yield _row(batch, file, number, images)
          number += 1
  except Exception as error:  # pyarrow raises errors of any kind at damaged files.
    message = f"{file} cannot be read to its end ({error}); it must be a Parquet file."
    yield Rejected(file, "", "unreadable_file", message)


def _columns(group) -> tuple[list[str], int, int]:
  """Returns the columns of a group of rows that records read, their bytes, and the rows."""
  columns, size = [], 0
  for i in range(group.num_columns):
    column = group.column(i)
    name, _, inner = column.path_in_schema.partition(".")
    # A list in a row could be of any length.
    if name == "facts" or (name in NAMES and inner in ("", "bytes", "path")):
      columns.append(column.path_in_schema)
      size += column.total_uncompressed_size
  return columns, size, group.num_rows


def _row(batch, file: str, number: int, images: Callable) -> Record | Rejected:
  """Makes the record of a batch of one row."""
  where = f"{file}, row {number}"
  try:
    [row] = batch.to_pylist()
  except Exception as error:  # Bytes that are no UTF-8, dates out of range, ...
    return Rejected(file, str(number), "malformed_record", f"{where} cannot be read ({error}).")
  values = _parquet_values(row, f"{posixpath.basename(file)}/{number}")
  if "image" not in values and isinstance(row.get("text"), str):
    return checked_record(RawText, {**values, "text": row["text"]}, file, where)
  return images(checked_record(RawPair, values, file, where), posixpath.dirname(file), where)


def _parquet_values(row: dict, key: str) -> dict:
  values = renamed(row)
  image = values.get("image")
  if isinstance(image, dict):
    image = image.get("bytes") or image.get("path")
  values["image"] = image
  values["key"] = key_of(values, key)
  return {k: v for k, v in values.items() if v is not None}
