"""Reads and writes safetensors files.

The files of a decoder are read in slices, so that a process loads only what its devices need. Those
of small models are read and written whole.
"""

from collections.abc import Callable, Collection, Mapping
import functools
import math
import os
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors import numpy as safetensors

from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import check_foreign, read_foreign_json
from cm3leon_jax.stages.stages import differences, id_of
from cm3leon_jax.weights.tensor_files import DTYPES, INDEX, WEIGHTS, Tensor

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

  def __init__(self, folder: epath.PathLike, files: Collection[str] = ()):
    """Opens files of a folder; without `files`, those of its model.

    Raises:
      UserError: a file is absent or damaged.
    """
    self.folder = epath.Path(folder)
    places = None if files else files_of(self.folder)
    names = files or (sorted(set(places.values())) if places else [WEIGHTS])
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
    if (result := self.shape(name)) != shape:
      raise UserError(
        f"{self.folder}: tensor '{name}' has shape {list(result)}; its config.json requires "
        f"{list(shape)}."
      )

  def dtype(self, name: str) -> str:
    """Returns the dtype of a tensor in safetensors notation, e.g. "F32". Raises like `shape`."""
    return self._view(name).get_dtype()

  def read(self, name: str, *index: slice, as_stored: bool = False) -> np.ndarray:
    """Reads a tensor, or the part of it that `index`, slices of its first axes, selects.

    Returns fp32; fp64 for tensors that are stored in fp64; the stored dtype if `as_stored`.

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
    if not as_stored:
      x = np.asarray(x, np.float64 if x.dtype == np.float64 else np.float32)
    if not np.isfinite(x).all():
      raise UserError(f"{self.folder}: tensor '{name}' has values that are not finite.")
    return x

  def tensor(self, name: str) -> Tensor:
    """Returns a tensor for writing it as it is, in its dtype."""
    dtype = next(key for key, (kind, _) in DTYPES.items() if kind == self.dtype(name))
    return Tensor(name, self.shape(name), dtype, functools.partial(self.read, name))

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
      result = deserialize(path.read_bytes())
      return {name: functools.partial(_InMemory, about) for name, about in result}
    names = safe_open(os.fspath(path), framework="np").keys()
    return {name: functools.partial(_view, os.fspath(path), name) for name in names}
  except SafetensorError as error:
    raise UserError(f"{path} is damaged ({error}).") from error


def _view(path: str, name: str) -> Any:
  """Opens the file for one tensor: parts of a mapped file that were read stay in memory."""
  return safe_open(path, framework="np").get_slice(name)


def save(path: epath.PathLike, params: dict) -> None:
  """Writes a safetensors file atomically. The name of a tensor is its keys, joined by dots."""
  flat = traverse_util.flatten_dict(jax.device_get(params), sep=".")
  with replacing(path) as file:
    file.write(safetensors.save({name: np.asarray(x) for name, x in flat.items()}))


def not_finite(tensors: Mapping[str, np.ndarray]) -> str:
  """Returns the name of the first tensor with NaNs or infinities; "" if all values are finite."""
  return next((name for name, x in tensors.items() if not np.isfinite(x).all()), "")


def load(path: epath.PathLike, expected: dict, command: str) -> dict:
  """Loads parameters from a file that `save` wrote, onto the default device.

  Args:
    expected: parameters (or abstract arrays) with the expected names, shapes and dtypes. Loaded
      arrays are converted to these dtypes.
    command: command of `cm3leon` that writes the file, for error messages.

  Raises:
    UserError: the file is missing or damaged, has other names or shapes, or contains NaNs or
      infinities.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f"{path} does not exist: run `cm3leon {command}` first.")
  remedy = f"delete {path.parent} and run `cm3leon {command}` again"
  sizes = [x.size for x in traverse_util.flatten_dict(expected).values()]
  check_foreign(path, 8 * sum(sizes) + 2**10 * len(sizes) + 2**20)  # fp64, names, other metadata.
  try:
    flat = safetensors.load(path.read_bytes())
  except SafetensorError as error:
    raise UserError(f"{path} is damaged ({error}): {remedy}.") from error
  expected = traverse_util.flatten_dict(expected, sep=".")
  # Shapes are compared as text, because `differences` would ignore the empty shape of a missing
  # scalar.
  result, wanted = ({name: str(x.shape) for name, x in xs.items()} for xs in (flat, expected))
  if changed := differences(result, wanted):
    raise UserError(f"{path} does not match the config next to it ({changed[0]}): {remedy}.")
  if bad := not_finite(flat):
    raise UserError(f"{path}: tensor '{bad}' has values that are not finite: {remedy}.")
  flat = {name: x.astype(expected[name].dtype) for name, x in flat.items()}
  return jax.device_put(traverse_util.unflatten_dict(flat, sep="."))


def files_of_index(path: epath.PathLike) -> dict[str, str]:
  """Maps each tensor to its file, as the index of a sharded safetensors checkpoint says.

  Raises:
    UserError: the index is damaged, or names a file outside its folder.
  """
  places = read_foreign_json(path, {"weight_map": dict})["weight_map"]
  for file in places.values():
    if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
      raise UserError(
        f"{path} names the file {short(file)}; it must be a file in the same folder: write the "
        "folder again."
      )
  return places
