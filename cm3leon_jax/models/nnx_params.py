"""Converts the parameters of NNX modules from and to nested dicts with string keys."""

from collections.abc import Callable
import math

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np


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
