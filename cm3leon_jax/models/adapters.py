"""Implements low-rank adapters of the layers' matrices (LoRA, Hu et al. 2021, section 4.1).

A matrix W of a layer, seen as [in, out], is replaced by W + alpha / R x A B. A [in, R] and B
[R, out] are trained, and W is frozen. B starts at 0, so that the first step has the losses of W.
"""

# K layers, R rank, D width, N heads, H head size, F feed-forward.

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.mesh import RULES, spec
from cm3leon_jax.models.attention import wide

# Matrix -> logical axes of its input and of its output.
AXES = {
  **dict.fromkeys("qkv", (("embed",), ("heads", "head_dim"))),
  "out": (("heads", "head_dim"), ("embed",)),
  "up": (("embed",), ("mlp",)),
  "gate": (("embed",), ("mlp",)),
  "down": (("mlp",), ("embed",)),
}
# Logical axis -> its letter in an einsum.
_LETTERS = {"embed": "D", "heads": "N", "head_dim": "H", "mlp": "F"}


def init(model: ModelConfig, config: AdapterConfig, key: Key[Array, ""]) -> dict:
  """Initializes fp32 adapters of all layers, sharded like the matrices over the current mesh.

    {"q": {"a": [K, D, R], "b": [K, R, N, H]}, ..., "down": {"a": [K, F, R], "b": [K, R, D]}}

  A is normally distributed with variance 1 / in, so that x A has the size of x. B is 0.
  """
  adapters: dict = {}
  for name in config.matrices(model):
    sizes, (ins, outs) = _sizes(model, name), AXES[name]
    key, own = jax.random.split(key)
    shape = [sizes[axis] for axis in ins]
    a = jax.random.normal(
      own,
      (model.num_layers, *shape, config.rank),
      jnp.float32,
      out_sharding=spec("layers", *ins, "rank"),
    )
    b = jnp.zeros(
      (model.num_layers, config.rank, *(sizes[axis] for axis in outs)),
      jnp.float32,
      out_sharding=spec("layers", "rank", *outs),
    )
    adapters[name] = {"a": a / math.sqrt(math.prod(shape)), "b": b}
  return adapters


def count(model: ModelConfig, config: AdapterConfig, mesh: Mapping[str, int] | None = None) -> int:
  """Counts the parameters of the adapters, or those on one device of a mesh.

  `mesh` contains the size of each mesh axis.
  """
  parts = mesh or {}

  def length(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    result: int = math.prod(sizes[axis] for axis in axes)
    for axis in axes:
      split: Any = RULES[axis] or ()
      names = (split,) if isinstance(split, str) else split
      result //= math.prod(parts.get(name, 1) for name in names)
    return result

  lengths = (
    length(axes, _sizes(model, name)) for name in config.matrices(model) for axes in AXES[name]
  )
  return model.num_layers * config.rank * sum(lengths)


def _sizes(model: ModelConfig, name: str) -> dict[str, int]:
  sizes = {"embed": model.width, "heads": model.key_heads if name in "kv" else model.num_heads}
  return sizes | {"head_dim": model.head_dim, "mlp": model.mlp_width}


def scaled(adapters: dict, alpha: float) -> dict:
  """Multiplies adapters by alpha / R. Only the result is added to the matrices."""

  def scale(factors: dict) -> dict:
    a, b = factors["a"], factors["b"]
    return {"a": a, "b": alpha / a.shape[-1] * b}

  return {name: scale(factors) for name, factors in adapters.items()}


def merge(params: dict, adapters: dict, config: AdapterConfig) -> dict:
  """Adds adapters to the parameters of a decoder. The sums are computed in fp32.

  The result has the dtypes and shardings of `params`.
  """
  blocks = dict(params["blocks"])
  factors = scaled(adapters, config.alpha)
  deltas = {name: _product(name, factors[name]) for name in factors}
  for name in blocks.keys() & deltas.keys():
    blocks[name] = _sum(blocks[name], deltas[name])
  stack = "qkv" if "qkv" in blocks else "kv"
  if any(name in deltas for name in stack):
    parts = [blocks[stack][:, i] for i in range(len(stack))]
    parts = [_sum(w, deltas[name]) if name in deltas else w for name, w in zip(stack, parts)]
    blocks[stack] = jnp.stack(parts, axis=1)
  return {**params, "blocks": blocks}


def _product(name: str, factors: dict) -> Float[Array, "K D *outs"]:
  ins, outs = ("".join(_LETTERS[axis] for axis in axes) for axes in AXES[name])
  equation = f"K{ins}R,KR{outs}->K{ins}{outs}"
  return jnp.einsum(equation, factors["a"], factors["b"], precision="highest")


def _sum(
  w: Float[Array, "K D *outs"], delta: Float[Array, "K D *outs"]
) -> Float[Array, "K D *outs"]:
  return (w.astype(wide(w.dtype)) + delta).astype(w.dtype)
