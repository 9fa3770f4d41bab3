"""Parameters for decoding: compute dtype or int8, one array per matrix, a head for image codes."""

# D width, V vocabulary, C image codes.

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, PyTree
from jaxtyping import Int8 as Int8Array

from cm3leon_jax.mesh import RULES, shard
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.vocab import VocabLayout

DTYPES = ("compute", "int8")
# Products of a block -> the axes that they sum over.
SUMMED = {"qkv": (1,), "out": (0, 1), "up": (0,), "gate": (0,), "down": (0,)}


class Int8(NamedTuple):
  """A matrix as int8 times one scale per output: its largest absolute entry / 127."""

  values: Int8Array[Array, "..."]
  scale: Float32[Array, "..."]


class DecodeParams(NamedTuple):
  """See `prepare`.

  Attributes:
    model: of the Transformer, in the compute dtype; `blocks` is a tuple of the layers' parameters,
      q, k and v apart, each matrix an array of its own (XLA would copy a part of a stacked array
      before each product), or `Int8`.
    image_head: columns of the output table for image codes; None: not kept separately.
    head: the output table, image codes first, then text: a code has the same column, and so the
      same noise when it is sampled, as in `image_head`.
  """

  model: dict
  image_head: Float[Array, "D C"] | None
  head: Float[Array, "D V"]


def quantized(w: Float[Array, "..."], summed: tuple[int, ...]) -> Int8:
  """Quantizes a matrix; `summed` are the axes that its product sums over."""
  scale = jnp.maximum(jnp.max(jnp.abs(w), axis=summed, keepdims=True) / 127, 1e-30)
  return Int8(jnp.round(w / scale).astype(jnp.int8), scale.astype(jnp.float32))


def dequantized(tree: PyTree, dtype: DTypeLike) -> PyTree:
  """Returns the tree with every `Int8` as a matrix of `dtype`."""

  def matrix(x: Array | Int8) -> Array:
    if not isinstance(x, Int8):
      return x
    return (x.values.astype(jnp.float32) * x.scale).astype(dtype)

  return jax.tree.map(matrix, tree, is_leaf=lambda x: isinstance(x, Int8))


def head_ids(vocab: VocabLayout) -> Int32[Array, " V"]:
  """Returns the id of each column of `DecodeParams.head`."""
  return jnp.roll(jnp.arange(vocab.size, dtype=jnp.int32), vocab.image_size)


def head_axis(rows: int) -> str | None:
  """Returns the logical axis of an output table's rows: "vocab" if its devices divide them."""
  devices = jax.sharding.get_abstract_mesh().shape.get(RULES["vocab"], 1)
  return None if rows % devices else "vocab"


def _at(tree: PyTree, i: int) -> PyTree:
  return jax.tree.map(lambda x: x[i], tree)


def prepare_layer(layer: dict, dtype: str = "compute") -> dict:
  """Prepares one layer's parameters in the compute dtype, see `prepare`."""
  if dtype == "int8":
    layer = {name: quantized(w, SUMMED[name]) if name in SUMMED else w for name, w in layer.items()}
  return {**layer, "qkv": tuple(_at(layer["qkv"], i) for i in range(3))}


@functools.partial(jax.jit, static_argnames=("config", "vocab", "dtype", "image_head"))
def prepare(
  params: dict,
  *,
  config: ModelConfig,
  vocab: VocabLayout,
  dtype: str = "compute",
  image_head: bool = True,
) -> DecodeParams:
  """Prepares parameters once for many calls. Needs a mesh.

  Args:
    params: of the model `config`.
    config: static.
    vocab: static.
    dtype: one of `DTYPES`: the compute dtype for all, or int8 for the products of the blocks.
    image_head: whether to keep a copy of the output table's image rows.
  """

  def columns(rows: Float[Array, "V D"]) -> Float[Array, "D V"]:
    return shard(rows.T, None, head_axis(len(rows)))

  params = jax.tree.map(lambda x: x.astype(jnp.dtype(config.dtype)), params)
  table = transformer.bind(config, params).output_table()
  images_first = jnp.roll(shard(table, None, None), vocab.image_size, axis=0)
  layers = [_at(params["blocks"], i) for i in range(config.num_layers)]
  blocks = tuple(prepare_layer(layer, dtype) for layer in layers)
  return DecodeParams(
    {**params, "blocks": blocks},
    columns(images_first[: vocab.image_size]) if image_head else None,
    columns(images_first),
  )
