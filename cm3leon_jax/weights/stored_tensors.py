"""Reads safetensors files in slices, so that a process loads only what its devices need."""

from collections.abc import Callable, Mapping
import functools
import math
import os
from typing import Any

from etils import epath
import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from cm3leon_jax.config import UserError
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import check_foreign
from cm3leon_jax.parameters import files_of_index
from cm3leon_jax.runs.stages import id_of
from cm3leon_jax.weights.tensor_files import DTYPES, INDEX, WEIGHTS

FLOATS = {name: dtype for name, dtype in DTYPES.values() if not name.startswith("I")}


def are_in(folder: epath.PathLike) -> bool:
  """Returns whether a folder contains the weights of a model, in one or several files."""
  folder = epath.Path(folder)
  return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def files_of(folder: epath.PathLike) -> dict[str, str] | None:
  """Returns {tensor name: file name} from the index in a folder; None if there is no index.

  Raises:
    UserError: the index is damaged, or names a path that is not a file in the folder.
  """
  folder = epath.Path(folder)
  if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
    return None
  return files_of_index(folder / INDEX)


def digest_of(folder: epath.PathLike) -> str | None:
  """Returns the SHA-256 of the weights file, or a digest of several files; None without a file."""
  folder = epath.Path(folder)
  places = files_of(folder)
  if places is None:
    return digest(folder / WEIGHTS)
  names = [INDEX, *sorted(set(places.values()))]
  return id_of({name: {"sha256": digest(folder / name) or "absent"} for name in names})


class StoredTensors:
  """Floating-point tensors in the safetensors files of a folder, read by name."""

  def __init__(self, folder: epath.PathLike):
    """Opens the files.

    Raises:
      UserError: a file is absent or damaged.
    """
    self.folder = epath.Path(folder)
    places = files_of(self.folder)
    names = sorted(set(places.values())) if places else [WEIGHTS]
    self._views: dict[str, Callable] = {}
    for name in names:
      self._views |= _open(self.folder / name)
    if lost := sorted(set(places or ()) - set(self._views)):
      raise UserError(
        f"{self.folder / INDEX} names the tensor '{lost[0]}', but {(places or {})[lost[0]]} does "
        "not contain it: write the folder again."
      )

  @property
  def names(self) -> list[str]:
    return list(self._views)

  @property
  def count(self) -> int:
    """Total number of elements."""
    return sum(math.prod(self.shape(name)) for name in self.names)

  def __contains__(self, name: str) -> bool:
    return name in self._views

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor. Raises UserError if the tensor does not exist."""
    return tuple(self._view(name).get_shape())

  def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises UserError if a tensor is missing or has a different shape."""
    if (found := self.shape(name)) != shape:
      raise UserError(
        f"{self.folder}: tensor '{name}' has shape {list(found)}; its config.json requires "
        f"{list(shape)}."
      )

  def dtype(self, name: str) -> str:
    """Returns the dtype of a tensor in safetensors notation, e.g. "F32". Raises like `shape`."""
    return self._view(name).get_dtype()

  def read(self, name: str, *index: slice) -> np.ndarray:
    """Reads a tensor, or the part of it that `index`, slices of its first axes, selects.

    Returns fp32; fp64 for tensors that are stored in fp64.

    Raises:
      UserError: the tensor does not exist, is not floating-point, or has values that are not
        finite.
    """
    view = self._view(name)
    if view.get_dtype() not in FLOATS:
      raise UserError(
        f"{self.folder}: tensor '{name}' is of dtype {view.get_dtype()}; it must be one of "
        f"{', '.join(FLOATS)}."
      )
    bounds = (part.indices(size) for part, size in zip(index, view.get_shape()))
    try:
      x = view[tuple(slice(start, stop) for start, stop, _ in bounds) or (slice(None),)]
    except SafetensorError as error:
      raise UserError(f"{self.folder}: tensor '{name}' cannot be read ({error}).") from error
    x = np.asarray(x, np.float64 if x.dtype == np.float64 else np.float32)
    if not np.isfinite(x).all():
      raise UserError(f"{self.folder}: tensor '{name}' has values that are not finite.")
    return x

  def _view(self, name: str) -> Any:
    if name not in self._views:
      raise UserError(f"{self.folder} has no tensor '{name}', which its config.json requires.")
    return self._views[name]()


class _InMemory:
  """In-memory tensor of a file in a GCS bucket, with the interface of `safe_open`'s slices."""

  def __init__(self, about: dict):
    """`about` contains the dtype, shape and data (bytes) of the tensor."""
    self._about = about

  def get_shape(self) -> list[int]:
    return list(self._about["shape"])

  def get_dtype(self) -> str:
    return self._about["dtype"]

  def __getitem__(self, index: Any) -> np.ndarray:
    flat = np.frombuffer(self._about["data"], FLOATS[self.get_dtype()])
    return flat.reshape(self.get_shape())[index]


def _open(path: epath.Path) -> Mapping[str, Callable]:
  """Opens a file. Returns tensor name -> function that returns a view of the tensor."""
  if not path.exists():
    raise UserError(f"{path} does not exist, but the index in its folder names it.")
  check_foreign(path)
  try:
    if "://" in os.fspath(path):  # A file in a GCS bucket cannot be memory-mapped.
      found = deserialize(path.read_bytes())
      return {name: functools.partial(_InMemory, about) for name, about in found}
    file = safe_open(os.fspath(path), framework="np")
    names = file.keys()
    return {name: functools.partial(file.get_slice, name) for name in names}
  except SafetensorError as error:
    raise UserError(f"{path} is damaged ({error}).") from error
