"""Parameters of a model as nested dicts with string keys: from and to NNX modules and files."""

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
from cm3leon_jax.files.json_files import read_foreign_json
from cm3leon_jax.runs.stages import differences


def structure(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
  """Splits the module that `make()` returns, without computing it, for `fill`."""
  return nnx.split(nnx.eval_shape(make))


def to_dict(state: nnx.State) -> dict:
  """Parameters of a module's state; a list of modules becomes a dict with keys "0", "1", ..."""
  flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
  return traverse_util.unflatten_dict({tuple(map(str, path)): x for path, x in flat.items()})


def fill(graphdef: nnx.GraphDef, state: nnx.State, params: dict) -> nnx.Module:
  """Makes the module of `structure` with `params` in it; cheap, for use inside jitted functions."""
  flat = {
    tuple(int(k) if k.isdigit() else k for k in path): x
    for path, x in traverse_util.flatten_dict(params).items()
  }
  state = jax.tree.map(lambda x: x, state)
  nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(flat))
  return nnx.merge(graphdef, state)


def random(state: nnx.State, key: Key[Array, ""]) -> dict:
  """Initializes the parameters of a module from its abstract state, as a pure dict.

  Kernels are normal with variance 1 / fan-in, biases 0, codes standard normal.
  """
  flat = traverse_util.flatten_dict(to_dict(state))
  shapes = {path: x.shape for path, x in flat.items()}
  ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
  # One call for all parameters: each takes XLA almost a second to compile on a CPU.
  pieces = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32), ends[:-1])
  std = {1: lambda shape: 0.0, 2: lambda shape: 1.0, 4: lambda shape: math.prod(shape[:-1]) ** -0.5}
  return traverse_util.unflatten_dict(
    {
      path: std[len(shape)](shape) * x.reshape(shape)
      for (path, shape), x in zip(shapes.items(), pieces)
    }
  )


def save(path: epath.PathLike, params: dict) -> None:
  """Writes a safetensors file, see `replacing`; names of tensors are the keys joined by dots."""
  flat = traverse_util.flatten_dict(jax.device_get(params), sep=".")
  with replacing(path) as file:
    file.write(safetensors.save({name: np.asarray(x) for name, x in flat.items()}))


def not_finite(tensors: Mapping[str, np.ndarray]) -> str:
  """Returns the name of the first tensor with NaN or infinity; "" if there is none."""
  return next((name for name, x in tensors.items() if not np.isfinite(x).all()), "")


def load(path: epath.PathLike, expected: dict, command: str) -> dict:
  """Reads what `save` wrote, in the dtypes that are expected, onto the default device.

  Args:
    path: of the file.
    expected: parameters or their types, with the names and shapes that the file must hold.
    command: that makes the file; for messages.

  Raises:
    UserError: the file is absent or damaged, or it holds other names or shapes, or values that are
      not finite.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f"{path} does not exist: run `cm3leon {command}` first.")
  remedy = f"delete {path.parent} and run `cm3leon {command}` again"
  try:
    flat = safetensors.load(path.read_bytes())
  except SafetensorError as error:
    raise UserError(f"{path} is damaged ({error}): {remedy}.") from error
  expected = traverse_util.flatten_dict(expected, sep=".")
  # As text: the shape of a scalar is empty, and what is empty may be absent.
  found, wanted = ({name: str(x.shape) for name, x in xs.items()} for xs in (flat, expected))
  if changed := differences(found, wanted):
    raise UserError(f"{path} does not fit the config beside it ({changed[0]}): {remedy}.")
  if bad := not_finite(flat):
    raise UserError(f"{path}: tensor '{bad}' has values that are not finite: {remedy}.")
  flat = {name: x.astype(expected[name].dtype) for name, x in flat.items()}
  return jax.device_put(traverse_util.unflatten_dict(flat, sep="."))


def files_of_index(path: epath.PathLike) -> dict[str, str]:
  """Returns the file of each tensor by an index of safetensors files beside it.

  Raises:
    UserError: the index is damaged, or names what is no file of its folder.
  """
  places = read_foreign_json(path, {"weight_map": dict})["weight_map"]
  for file in places.values():
    if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
      raise UserError(
        f"{path} names the file {short(file)}; it must be a file of that folder: write the folder "
        "again."
      )
  return places
