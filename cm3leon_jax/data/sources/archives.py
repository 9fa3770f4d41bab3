"""Reads records from archives: WebDataset tars and Parquet files."""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import posixpath
import tarfile
from typing import Any

import fsspec

from cm3leon_jax import extras
from cm3leon_jax.data.sources.records import (
  ALIASES,
  RawPair,
  RawText,
  Record,
  Rejected,
  checked_record,
  key_of,
  renamed,
)
from cm3leon_jax.data.sources.samples import SAMPLE_SUFFIXES, sample_record
from cm3leon_jax.errors import UserError

MAX_MEMBER = 2**26  # Maximum size of a file in a tar, in bytes. A sparse file may claim any size.
# Maximum size in bytes of the columns that are read in a Parquet row group, and of their values.
MAX_GROUP = 2**30
PARQUET_BUFFER = 2**20
# Names of the Parquet columns that are read.
NAMES = {*ALIASES, *itertools.chain(*ALIASES.values())}
NAMES |= {field.name for cls in (RawPair, RawText) for field in dataclasses.fields(cls)}


def tar_samples(
  fs: fsspec.AbstractFileSystem, file: str, images: Callable
) -> Iterator[Record | Rejected]:
  """Yields the samples of an img2dataset tar: images and captions whose names have equal stems."""
  del images  # Not needed, because the images are in the tar.
  try:
    # "r:" rejects compressed tars, because a small file could become a thousand times as large.
    with (
      fs.open(file, "rb") as stream,
      tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
      stem = ""
      sample: dict[str, bytes] = {}
      for member in tar:
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
          content = tar.extractfile(member)
          assert content is not None
          sample[suffix] = content.read()
      yield from _sample(file, stem, sample)
  except Exception as error:  # tarfile raises many kinds of errors for invalid headers.
    message = (
      f"{file} cannot be read to its end ({error}); it must be a complete, uncompressed tar file."
    )
    yield Rejected(file, "", "unreadable_file", message)


def _sample(file: str, stem: str, sample: dict[str, bytes]) -> Iterator[Record | Rejected]:
  if sample:
    yield sample_record(file, f"{file}, sample '{stem}'", stem, sample, source=file)


def parquet_rows(
  fs: fsspec.AbstractFileSystem, file: str, images: Callable
) -> Iterator[Record | Rejected]:
  """Yields the records of a Parquet file: a pair for a row with an image, otherwise a text.

  An image is bytes, a path, or a dict of both (Hugging Face). `images` checks image paths and makes
  them absolute, see `formats._with_images`. A small file may claim values of any size, so the rows
  of a group are left out from the row on at which they exceed MAX_GROUP.
  """
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f"{file} needs pyarrow ({error}): {extras.install('data')}.") from error
  number = 0
  try:
    with fs.open(file, "rb") as stream:
      # Without this option, pyarrow would read a whole row group into memory.
      table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=PARQUET_BUFFER)
      for group in range(table.num_row_groups):
        described = table.metadata.row_group(group)
        columns, size = _columns(described)
        end = number + described.num_rows
        # One row at a time, because a dictionary repeats its full value in every row.
        for batch in () if size > MAX_GROUP else table.iter_batches(1, [group], columns):
          size += batch.nbytes
          if size > MAX_GROUP:
            break
          yield _row(batch.to_pylist()[0], file, number, images)
          number += 1
        if number < end:
          message = (
            f"{file}, the rows from {number} to {end - 1} are not read: their row group has more "
            f"than {MAX_GROUP:,} bytes: write smaller row groups."
          )
          yield Rejected(file, str(number), "large_file", message)
          number = end
  except Exception as error:  # pyarrow raises many kinds of errors for damaged files.
    message = (
      f"{file} cannot be read from row {number} on ({error}); it must be a complete Parquet file."
    )
    yield Rejected(file, "", "unreadable_file", message)


def _columns(group: Any) -> tuple[list[str], int]:
  """Returns the columns of a row group that records need, and their bytes."""
  columns, size = [], 0
  for i in range(group.num_columns):
    column = group.column(i)
    name, _, inner = column.path_in_schema.partition(".")
    # Skip nested lists, because a list in one row could have any length.
    if name == "facts" or (name in NAMES and inner in ("", "bytes", "path")):
      columns.append(column.path_in_schema)
      size += column.total_uncompressed_size
  return columns, size


def _row(row: dict, file: str, number: int, images: Callable) -> Record | Rejected:
  where = f"{file}, row {number}"
  values = renamed(row)
  image = values.get("image")
  if isinstance(image, dict):
    image = image.get("bytes") or image.get("path")
  values |= {"image": image, "key": key_of(values, f"{posixpath.basename(file)}/{number}")}
  values = {name: value for name, value in values.items() if value is not None}
  if "image" not in values and isinstance(row.get("text"), str):
    return checked_record(RawText, {**values, "text": row["text"]}, file, where)
  return images(checked_record(RawPair, values, file, where), posixpath.dirname(file), where)
