"""Safetensors files of a model, read in slices: a process need not hold what its devices do not."""

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
  """Returns whether a folder has the weights of a model, in one file or in several."""
  folder = epath.Path(folder)
  return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def files_of(folder: epath.PathLike) -> dict[str, str] | None:
  """Returns the file of each tensor by the index of a folder; None: one file has all.

  Raises:
    UserError: the index is damaged, or names what is no file in the folder.
  """
  folder = epath.Path(folder)
  if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
    return None
  return files_of_index(folder / INDEX)


def digest_of(folder: epath.PathLike) -> str | None:
  """Returns the SHA-256 of a folder's one file, or a digest of its several ones; None: none."""
  folder = epath.Path(folder)
  places = files_of(folder)
  if places is None:
    return digest(folder / WEIGHTS)
  names = [INDEX, *sorted(set(places.values()))]
  return id_of({name: {"sha256": digest(folder / name) or "absent"} for name in names})


class StoredTensors:
  """Floating-point tensors of a folder, by name."""

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
        f"{self.folder / INDEX} names the tensor '{lost[0]}', which {(places or {})[lost[0]]} does "
        "not have: write the folder again."
      )

  @property
  def names(self) -> list[str]:
    """Names of all tensors."""
    return list(self._views)

  @property
  def count(self) -> int:
    """Number of elements of all tensors."""
    return sum(math.prod(self.shape(name)) for name in self.names)

  def __contains__(self, name: str) -> bool:
    return name in self._views

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor. Raises UserError if there is none."""
    return tuple(self._view(name).get_shape())

  def dtype(self, name: str) -> str:
    """Returns the dtype of a tensor as the format names it, "F32". Raises as `shape`."""
    return self._view(name).get_dtype()

  def read(self, name: str, *index: slice) -> np.ndarray:
    """Reads a tensor or, for slices of its first axes, a part of it, as fp32 (fp64 as it is).

    Raises:
      UserError: there is no such tensor, it holds no floating-point numbers, or some that are not
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
      raise UserError(f"{self.folder} has no tensor '{name}', which its config.json asks for.")
    return self._views[name]()


class _InMemory:
  """A tensor of a file in a bucket, with the interface of a slice of `safe_open`."""

  def __init__(self, about: dict):
    """Takes dtype, shape and bytes."""
    self._about = about

  def get_shape(self) -> list[int]:
    return list(self._about["shape"])

  def get_dtype(self) -> str:
    return self._about["dtype"]

  def __getitem__(self, index: Any) -> np.ndarray:
    flat = np.frombuffer(self._about["data"], FLOATS[self.get_dtype()])
    return flat.reshape(self.get_shape())[index]


def _open(path: epath.Path) -> Mapping[str, Callable]:
  """Opens a file: name of each tensor -> a function that returns a view of it."""
  if not path.exists():
    raise UserError(f"{path} does not exist, but the index beside it names it.")
  check_foreign(path)
  try:
    if "://" in os.fspath(path):  # A file in a bucket has no pages to map.
      found = deserialize(path.read_bytes())
      return {name: functools.partial(_InMemory, about) for name, about in found}
    file = safe_open(os.fspath(path), framework="np")
    names = file.keys()
    return {name: functools.partial(file.get_slice, name) for name in names}
  except SafetensorError as error:
    raise UserError(f"{path} is damaged ({error}).") from error
