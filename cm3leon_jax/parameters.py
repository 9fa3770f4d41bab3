"""Converts parameters between NNX modules, nested dicts with string keys, and files."""

from collections.abc import Callable, Mapping
import math
import os

from etils import epath
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from cm3leon_jax.config import UserError, short
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import check_foreign, read_foreign_json
from cm3leon_jax.runs.stages import differences


def structure(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns the graph and the abstract state of the module that `make` returns, for `fill`."""
  return nnx.split(nnx.eval_shape(make))


def to_dict(state: nnx.State) -> dict:
  """Converts a module's state to a dict. A list of modules gets the keys "0", "1", ..."""
  flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
  return traverse_util.unflatten_dict({tuple(map(str, path)): x for path, x in flat.items()})


def fill(graphdef: nnx.GraphDef, state: nnx.State, params: dict) -> nnx.Module:
  """Builds a module from the results of `structure` and from parameters.

  The function is cheap enough to be called in jitted functions.
  """
  flat = {
    tuple(int(k) if k.isdigit() else k for k in path): x
    for path, x in traverse_util.flatten_dict(params).items()
  }
  state = jax.tree.map(lambda x: x, state)
  nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(flat))
  return nnx.merge(graphdef, state)


def random(state: nnx.State, key: Key[Array, ""]) -> dict:
  """Initializes the parameters of a module from its abstract state, and returns them as a dict.

  Convolution kernels (4 axes) are normally distributed with variance 1 / fan-in, codebooks (2 axes)
  with variance 1. Biases (1 axis) are 0.
  """
  flat = traverse_util.flatten_dict(to_dict(state))
  shapes = {path: x.shape for path, x in flat.items()}
  ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
  # One call draws all parameters, because XLA on a CPU takes almost a second to compile a call.
  pieces = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32), ends[:-1])
  std = {1: lambda shape: 0.0, 2: lambda shape: 1.0, 4: lambda shape: math.prod(shape[:-1]) ** -0.5}
  return traverse_util.unflatten_dict(
    {
      path: std[len(shape)](shape) * x.reshape(shape)
      for (path, shape), x in zip(shapes.items(), pieces)
    }
  )


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
  found, wanted = ({name: str(x.shape) for name, x in xs.items()} for xs in (flat, expected))
  if changed := differences(found, wanted):
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
