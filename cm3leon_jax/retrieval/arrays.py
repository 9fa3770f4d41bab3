"""Stores arrays of rows as zarr3 files, which many processes can write.

The files are local or in a GCS bucket. Every chunk has a checksum. A missing chunk is an error,
although TensorStore by default reads it as zeros.
"""

# n rows of the array, m rows to write.

from collections.abc import Iterable
import hashlib
import json
import math

from etils import epath
import numpy as np
import numpy.typing as npt
import tensorstore as ts

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.stages import stages, table

SCHEMA_VERSION = 1
INDEX, METADATA = "index.json", "zarr.json"
FILE_BYTES = 16 * 2**20  # Size of a file, which zarr calls a shard.
READ_BYTES = 16 * 2**10  # Size of a chunk in a file. Reading a row reads its whole chunk.
DIGEST_BYTES = 2**28  # Size of the blocks of rows whose digest is computed.


class ArrayStore:
  """Array of rows on disk. `len` and indexing use only committed rows.

  Processes on different hosts can write disjoint rows at the same time. index.json records the
  number of committed rows, so rows of a killed writer are never read. It also records a digest of
  the metadata of the array and, if `commit` was called with `digest`, a digest of all rows.
  """

  def __init__(self, path: epath.PathLike):
    """Opens a store. Raises UserError if it is absent or damaged, or has another schema version."""
    self.path = epath.Path(path)
    stages.check_files(self.path / INDEX)
    index = read_json(self.path / INDEX, {"schema_version": int, "rows": int})
    if index["schema_version"] != SCHEMA_VERSION:
      raise UserError(
        f"{self.path} has schema version {index['schema_version']}; this code reads version "
        f"{SCHEMA_VERSION}: delete it and run the command that writes it again."
      )
    self._rows, self._digest = index["rows"], index.get("digest")
    if "metadata" in index and index["metadata"] != _digest_of_metadata(self.path):
      raise UserError(f"{self.path / METADATA} was changed after it was written: {self._again()}.")
    try:
      _check_chunks(read_json(self.path / METADATA))
      self._array = ts.open(_spec(self.path), open=True).result()
    except (ValueError, LookupError, TypeError) as error:
      reason = str(error).splitlines()[0].partition(" [")[0]
      raise UserError(f"{self.path} cannot be opened ({reason}): {self._again()}.") from error
    if self._array.shape[0] < self._rows:
      raise UserError(
        f"{self.path} has {self._array.shape[0]} rows instead of {self._rows}: {self._again()}."
      )

  @classmethod
  def create(
    cls,
    path: epath.PathLike,
    row_shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    file_bytes: int | None = None,
  ) -> "ArrayStore":
    """Creates an empty store. If a store exists at `path`, it is deleted."""
    path, row_bytes = epath.Path(path), int(np.prod(row_shape)) * np.dtype(dtype).itemsize
    path.mkdir(parents=True, exist_ok=True)
    (path / INDEX).unlink(missing_ok=True)
    read = max(1, READ_BYTES // row_bytes)
    file = read * max(1, (file_bytes or FILE_BYTES) // (read * row_bytes))
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": (read, *row_shape), "codecs": checked, "index_codecs": checked}
    metadata = {
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": (file, *row_shape)}},
      "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {**_spec(path), "metadata": metadata}
    shape = (0, *row_shape)
    ts.open(spec, create=True, delete_existing=True, dtype=np.dtype(dtype), shape=shape).result()
    write_json(path / INDEX, {"schema_version": SCHEMA_VERSION, "rows": 0})
    return cls(path)

  @classmethod
  def prepare(
    cls, path: epath.PathLike, row_shape: tuple[int, ...], dtype: npt.DTypeLike, rows: int
  ) -> bool:
    """Resizes a store to `rows` rows. Keeps existing rows if they have this shape and dtype.

    Returns whether existing rows were kept. If they were not, all rows must be written again.
    """
    path = epath.Path(path)
    result = cls(path) if (path / INDEX).exists() else None
    kept = result is not None and result.shape[1:] == tuple(row_shape) and result.dtype == dtype
    store = result if result is not None and kept else cls.create(path, row_shape, dtype)
    write_json(path / INDEX, {"schema_version": SCHEMA_VERSION, "rows": 0})
    store._array.resize(exclusive_max=[rows, *row_shape]).result()
    return kept

  @property
  def dtype(self) -> np.dtype:
    return self._array.dtype.numpy_dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return (self._rows, *self._array.shape[1:])

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, rows: slice | npt.ArrayLike) -> np.ndarray:
    """Reads the rows of a slice or of an array of indices in [0, n).

    Raises UserError if a row is missing or damaged.
    """
    if isinstance(rows, slice):
      rows = slice(*rows.indices(self._rows))
    else:
      rows = np.asarray(rows)
      if rows.size and not (rows.min() >= 0 and rows.max() < self._rows):
        raise IndexError(f"rows [{rows.min()}, {rows.max()}] of {self._rows} in {self.path}")
    try:
      return self._array[rows].read().result()
    except ValueError as error:  # TensorStore raises ValueError for missing or damaged chunks.
      reason = str(error).splitlines()[0].partition(" [")[0]
      raise UserError(f"rows of {self.path} cannot be read ({reason}): {self._again()}.") from error

  def read_all(self) -> np.ndarray:
    """Reads all rows. Raises UserError if a row is damaged or the rows differ from their digest."""
    rows = self[:]
    if self._digest and _digest_of([rows]) != self._digest:
      raise UserError(f"{self.path} was changed after its rows were written: {self._again()}.")
    return rows

  def _again(self) -> str:
    stage = next((p for p in self.path.parents if p.name in table.STAGES), self.path.parent)
    return stages.again(stage, f"the folder {self.path}")

  def write(self, start: int, rows: np.ndarray) -> None:
    """Writes rows [m, ...] at `start`, cast to the dtype of the store. Call `prepare` first."""
    rows = np.asarray(rows)
    self._array[start : start + len(rows)].write(rows.astype(self.dtype)).result()

  def commit(self, digest: bool = False) -> None:
    """Commits all rows of the store. All rows must have been written.

    With `digest`, it also reads all rows and records their digest. It then raises UserError if a
    row was not written or is damaged.
    """
    self._rows = self._array.shape[0]
    index = {"schema_version": SCHEMA_VERSION, "rows": self._rows}
    index["metadata"] = _digest_of_metadata(self.path)
    if digest:
      row_bytes = max(1, int(np.prod(self.shape[1:])) * self.dtype.itemsize)
      step = max(1, DIGEST_BYTES // row_bytes)
      starts = range(0, self._rows, step)
      index["digest"] = _digest_of(self[start : start + step] for start in starts)
    write_json(self.path / INDEX, index)

  def append(self, rows: np.ndarray) -> None:
    """Appends and commits rows [m, ...]. Only one process may append."""
    start = self._rows
    self._array = self._array.resize(exclusive_max=[start + len(rows), *self.shape[1:]]).result()
    self.write(start, rows)
    self.commit()


def _check_chunks(fields: dict) -> None:
  """Raises ValueError if the chunks in zarr.json are larger than those of `create`, or compressed.

  TensorStore allocates memory for a chunk, and for whatever a compressed chunk expands to.
  """
  [sharding] = fields["codecs"]
  inner = sharding["configuration"]
  names = {codec["name"] for codec in (*inner["codecs"], *inner["index_codecs"])}
  chunk, row = fields["chunk_grid"]["configuration"]["chunk_shape"], fields["shape"][1:]
  size, row_size = (np.dtype(fields["data_type"]).itemsize * math.prod(x) for x in (chunk, row))
  if size > max(FILE_BYTES, row_size) or not names <= {"bytes", "crc32c"}:
    raise ValueError(f"its chunks have {size:,} bytes, or are compressed")


def _spec(path: epath.Path) -> dict:
  place = str(path) if "://" in str(path) else f"file://{path.resolve()}"
  # Chunks of zeros are also written, so that every missing chunk is an error.
  zeros = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
  return {"driver": "zarr3", "kvstore": f"{place}/", **zeros}


def _digest_of_metadata(path: epath.Path) -> str:
  """Returns the SHA-256 of the zarr metadata without the number of rows, which writers change."""
  fields = read_json(path / METADATA)
  fields["shape"] = fields.get("shape", [])[1:]
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _digest_of(blocks: Iterable[np.ndarray]) -> str:
  """Returns the SHA-256 of the rows of all blocks."""
  digest = hashlib.sha256()
  for block in blocks:
    digest.update(np.ascontiguousarray(block).tobytes())
  return digest.hexdigest()
