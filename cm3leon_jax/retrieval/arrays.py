"""Arrays on disk that grow by rows and that many processes write: zarr3, local or in a bucket."""

# n rows, m of them.

from etils import epath
import numpy as np
import tensorstore as ts

from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json, write_json

SCHEMA_VERSION = 1
INDEX = "index.json"
FILE_BYTES = 16 * 2**20  # Size of a file, a zarr shard.
READ_BYTES = 16 * 2**10  # Size of a chunk in a file; reading a row reads a chunk.


class ArrayStore:
  """Rows of one shape and dtype; `len`, slices and index arrays read committed rows.

  Processes on any machines may write disjoint rows. index.json has the number of committed rows:
  rows of a killed writer are never read.
  """

  def __init__(self, path: epath.PathLike):
    """Opens a store; raises UserError if it is absent or of another schema version."""
    self.path = epath.Path(path)
    index = read_json(self.path / INDEX, {"schema_version": int, "rows": int})
    if index["schema_version"] != SCHEMA_VERSION:
      raise UserError(
        f"{self.path} has schema version {index['schema_version']}; this code reads version "
        f"{SCHEMA_VERSION}: delete it and run the command that writes it again."
      )
    self._rows = index["rows"]
    self._array = ts.open(_spec(self.path), open=True).result()

  @classmethod
  def create(cls, path: epath.PathLike, row_shape: tuple[int, ...], dtype) -> "ArrayStore":
    """Creates an empty store; deletes an existing one."""
    path, row_bytes = epath.Path(path), int(np.prod(row_shape)) * np.dtype(dtype).itemsize
    path.mkdir(parents=True, exist_ok=True)
    (path / INDEX).unlink(missing_ok=True)
    read = max(1, READ_BYTES // row_bytes)
    file = read * max(1, FILE_BYTES // (read * row_bytes))
    layout = ts.ChunkLayout(
      write_chunk_shape=(file, *row_shape), read_chunk_shape=(read, *row_shape)
    )
    array = {"dtype": np.dtype(dtype), "shape": (0, *row_shape), "chunk_layout": layout}
    ts.open(_spec(path), create=True, delete_existing=True, **array).result()
    write_json(path / INDEX, {"schema_version": SCHEMA_VERSION, "rows": 0})
    return cls(path)

  @classmethod
  def prepare(cls, path: epath.PathLike, row_shape: tuple[int, ...], dtype, rows: int) -> None:
    """Makes room for `rows` rows; keeps the rows of an existing store of this shape and dtype."""
    path = epath.Path(path)
    store = cls(path) if (path / INDEX).exists() else cls.create(path, row_shape, dtype)
    if (store.shape[1:], store.dtype) != (tuple(row_shape), np.dtype(dtype)):
      store = cls.create(path, row_shape, dtype)
    write_json(path / INDEX, {"schema_version": SCHEMA_VERSION, "rows": 0})
    store._array.resize(exclusive_max=[rows, *row_shape]).result()

  @property
  def dtype(self) -> np.dtype:
    return self._array.dtype.numpy_dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return (self._rows, *self._array.shape[1:])

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, rows) -> np.ndarray:
    """Reads the rows of a slice or of an array of indices in [0, n)."""
    if isinstance(rows, slice):
      return self._array[slice(*rows.indices(self._rows))].read().result()
    rows = np.asarray(rows)
    if rows.size and not (rows.min() >= 0 and rows.max() < self._rows):
      raise IndexError(f"rows [{rows.min()}, {rows.max()}] of {self._rows} in {self.path}")
    return self._array[rows].read().result()

  def write(self, start: int, rows: np.ndarray) -> None:
    """Writes rows [m, ...] at `start`, cast to the dtype of the store; `prepare` makes room."""
    rows = np.asarray(rows)
    if rows.shape[1:] != self.shape[1:]:
      raise UserError(
        f"{self.path} holds rows of shape {self.shape[1:]}; rows of shape {rows.shape[1:]} cannot "
        "be written."
      )
    self._array[start : start + len(rows)].write(rows.astype(self.dtype)).result()

  def commit(self) -> None:
    """Commits all rows of the store, which must be written."""
    self._rows = self._array.shape[0]
    write_json(self.path / INDEX, {"schema_version": SCHEMA_VERSION, "rows": self._rows})

  def append(self, rows: np.ndarray) -> None:
    """Adds and commits rows [m, ...] after the last one; for a single writer."""
    start = self._rows
    self._array = self._array.resize(exclusive_max=[start + len(rows), *self.shape[1:]]).result()
    self.write(start, rows)
    self.commit()


def _spec(path: epath.Path) -> dict:
  place = str(path) if "://" in str(path) else f"file://{path.resolve()}"
  return {"driver": "zarr3", "kvstore": f"{place}/"}
