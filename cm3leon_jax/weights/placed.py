"""Loads a Hugging Face folder onto the mesh. Each process reads only what its devices need."""

# K layers, D width, N heads, H head size, F feed-forward, V vocabulary, P positions.

from collections.abc import Callable
import functools

from flax import traverse_util
import jax
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.mesh import abstract
from cm3leon_jax.models import transformer
from cm3leon_jax.weights import layouts
from cm3leon_jax.weights.layouts import Layout
from cm3leon_jax.weights.stored import StoredParams
from cm3leon_jax.weights.stored_tensors import StoredTensors
from cm3leon_jax.weights.tensor_files import DTYPES

Index = tuple[slice, ...]


def types_of(config: ModelConfig) -> dict:
  """Returns shapes, dtypes and shardings of the parameters on the current mesh."""
  types = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  return abstract(types, jax.sharding.get_mesh())


def load(tensors: StoredTensors, config: ModelConfig, dtype: str = "float32") -> dict:
  """Loads parameters onto the current mesh in `dtype` if the files store all in it, else in fp32.

  Raises:
    UserError: a tensor is absent, has a wrong shape, or has values that are not finite.
  """
  shapes = layouts.shapes_of(config)
  for tensor, shape in shapes.items():
    tensors.check_shape(tensor, shape)
  as_stored = all(tensors.dtype(tensor) == DTYPES[dtype][0] for tensor in shapes)
  kept = DTYPES[dtype if as_stored else "float32"][1]
  read_tensor = functools.partial(tensors.read, as_stored=as_stored)
  types = traverse_util.flatten_dict(types_of(config), sep=".")
  params = {}
  for name, kind in types.items():
    read = functools.partial(_read, read_tensor, config, name)
    params[name] = jax.make_array_from_callback(
      kind.shape, kind.sharding, functools.partial(_in_dtype, kept, read, kind.shape)
    )
  return traverse_util.unflatten_dict(params, sep=".")


def stored(tensors: StoredTensors, config: ModelConfig) -> StoredParams:
  """Opens parameters for reading in slices. It needs a current mesh, but no memory of devices."""
  types = traverse_util.flatten_dict(types_of(config), sep=".")
  shapes = {name: tuple(kind.shape) for name, kind in types.items()}

  def read(name: str, *index: int) -> np.ndarray:
    parts = [slice(i, i + 1) for i in index] + [slice(0, n) for n in shapes[name][len(index) :]]
    found = _read(tensors.read, config, name, tuple(parts))
    return found.reshape(shapes[name][len(index) :]).astype(np.float32, copy=False)

  return StoredParams(0, False, shapes, read)


def _in_dtype(
  dtype: np.dtype, read: Callable[[Index], np.ndarray], shape: tuple[int, ...], index: Index
) -> np.ndarray:
  """Reads the part `index` of an array. Takes bounds that JAX's slices omit from `shape`."""
  bounds = (part.indices(size) for part, size in zip(index, shape))
  return read(tuple(slice(start, stop) for start, stop, _ in bounds)).astype(dtype, copy=False)


def _read(read_tensor: Callable, config: ModelConfig, name: str, index: Index) -> np.ndarray:
  """Reads the part `index` of the parameter `name`, a dotted name.

  `read_tensor` is `StoredTensors.read`.
  """
  layout = layouts.layout_of(config)
  if name.startswith("blocks."):
    layers, *rest = index
    kind, size = name.removeprefix("blocks."), config.head_dim
    read = functools.partial(_read_layer, read_tensor, layout, size, kind, tuple(rest))
    return np.stack([read(f"{layout.prefix}.layers.{i}") for i in range(layers.start, layers.stop)])
  if name == "positions":
    rows, *rest = index
    first = layout.first_position
    index = (slice(rows.start + first, rows.stop + first), *rest)
  return read_tensor(f"{layout.tables[name]}.weight", *index)


def _read_layer(
  read_tensor: Callable, layout: Layout, head_size: int, kind: str, index: Index, layer: str
) -> np.ndarray:
  """Reads the part `index` of the parameter `kind` in one layer."""

  def heads(part: slice) -> slice:
    return slice(part.start * head_size, part.stop * head_size)

  def read(name: str, *part: slice) -> np.ndarray:
    return read_tensor(f"{layer}.{name}.weight", *part)

  if kind in layout.norms:
    return read_tensor(f"{layer}.{layout.norms[kind]}", *index)
  if kind in ("q", "kv", "qkv"):
    *which, D, N, _ = index
    names = [layouts.QKV["qkv".index(x)] for x in kind][which[0] if which else slice(None)]
    parts = [read(name, heads(N), D).T.reshape(-1, N.stop - N.start, head_size) for name in names]
    return np.stack(parts) if which else parts[0]
  if kind == "out":
    N, _, D = index
    return read(layout.out, D, heads(N)).T.reshape(N.stop - N.start, head_size, -1)
  ins, outs = index
  return read(layout.products[kind], outs, ins).T
