"""Prepares parameters for decoding: converts dtypes and makes a separate array for each matrix."""

# D width, V vocabulary, C image codes.

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, PyTree
from jaxtyping import Int8 as Int8Array

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.mesh import RULES, shard, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.attention import wide
from cm3leon_jax.models.products import Transposed, by_transposed
from cm3leon_jax.vocab import VocabLayout

DTYPES = ("compute", "int8")
NEVER = -1e9  # Logit of probability 0. It is finite, since -inf - (-inf) is NaN.
# Matrix of a block -> axes over which its product sums.
SUMMED = {"qkv": (1,), "q": (0,), "kv": (1,), "out": (0, 1), "up": (0,), "gate": (0,), "down": (0,)}


class Int8(NamedTuple):
  """A matrix in int8. The scale of each output is its largest absolute weight, divided by 127."""

  values: Int8Array[Array, "..."]
  scale: Float32[Array, "..."]


class DecodeParams(NamedTuple):
  """Parameters prepared for decoding; see `prepare`.

  Attributes:
    model: parameters of the Transformer in the compute dtype. `blocks` is a tuple with the
      parameters of each layer. Each matrix (also q, k and v) is a separate array or an `Int8`,
      because XLA would copy a slice of a stacked array before each product.
    image_head: columns of the output table for image codes; None if `head` is used for them, too.
    head: the output table, with image codes before text. An image code has the same column index in
      `image_head`, so it gets the same noise when it is sampled.
  """

  model: dict
  image_head: Float[Array, "D C"] | Transposed | None
  head: Float[Array, "D V"] | Transposed


def quantized(w: Float[Array, "..."], summed: tuple[int, ...]) -> Int8:
  """Quantizes a matrix to int8. `summed` are the axes over which its product sums."""
  scale = jnp.maximum(jnp.max(jnp.abs(w), axis=summed, keepdims=True) / 127, 1e-30)
  return Int8(jnp.round(w / scale).astype(jnp.int8), scale.astype(jnp.float32))


def dequantized(tree: PyTree, dtype: DTypeLike) -> PyTree:
  """Converts every `Int8` in a tree to a matrix of `dtype`."""

  def matrix(x: Array | Int8) -> Array:
    if not isinstance(x, Int8):
      return x
    return (x.values.astype(jnp.float32) * x.scale).astype(dtype)

  return jax.tree.map(matrix, tree, is_leaf=lambda x: isinstance(x, Int8))


def head_ids(vocab: VocabLayout) -> Int32[Array, " V"]:
  """Returns the token id of each column of `DecodeParams.head`."""
  return jnp.roll(jnp.arange(vocab.size, dtype=jnp.int32), vocab.image_size)


def head_axis(rows: int) -> str | None:
  """Returns the logical axis over which an output table with `rows` rows is sharded.

  The axis is "vocab" if it has several devices that divide the rows evenly, and None otherwise.
  """
  devices = jax.sharding.get_abstract_mesh().shape.get(RULES["vocab"], 1)
  return None if devices == 1 or rows % devices else "vocab"


def head_logits(
  hidden: Float[Array, "B L D"], head: Float[Array, "D V"] | Transposed
) -> Float[Array, "B L V"]:
  """Computes logits in fp32, sharded as `head`, which is a table of `DecodeParams`."""
  kind = wide(hidden.dtype)
  if isinstance(head, Transposed):
    axes = "batch", "length", head_axis(head.stored.shape[0])
    return by_transposed("BLD,DV->BLV", hidden, head, axes, kind)
  split = spec("batch", "length", head_axis(head.shape[1]))
  return jnp.einsum("BLD,DV->BLV", hidden, head, preferred_element_type=kind, out_sharding=split)


def only_codes(logits: Float[Array, "*batch V"], vocab: VocabLayout) -> Float[Array, "*batch _"]:
  """Restricts the result of `head_logits` to image codes, which are the first columns."""
  axis = head_axis(logits.shape[-1])
  if axis is None:
    return shard(logits[..., : vocab.image_size], "batch", *[None] * (logits.ndim - 1))
  # A mask instead of a slice, so that the columns remain sharded.
  is_code = shard(jnp.arange(logits.shape[-1]) < vocab.image_size, axis)
  return jnp.where(is_code, logits, NEVER)


def _transposed(tree: PyTree, summed: int) -> PyTree:
  """Moves the first `summed` axes of each matrix to the end."""
  leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Int8))
  axes = range(summed), range(-summed, 0)
  moved = [jax.tree.map(lambda x: jnp.moveaxis(x, *axes), w) for w in leaves]
  return structure.unflatten(map(Transposed, moved))


def _at(tree: PyTree, i: int | tuple[int, ...]) -> PyTree:
  return jax.tree.map(lambda x: x[i], tree)


def prepare_layer(layer: dict, dtype: str = "compute", transposed: bool = False) -> dict:
  """Prepares a layer whose parameters already have the compute dtype; see `prepare`."""
  if dtype == "int8":
    layer = {name: quantized(w, SUMMED[name]) if name in SUMMED else w for name, w in layer.items()}
  qkv = tuple(_at(layer[name], index) for name, index in transformer.places(layer))
  rest = {name: w for name, w in layer.items() if name not in ("q", "kv")}
  layer = {**rest, "qkv": qkv}
  if not transposed:
    return layer
  return {n: _transposed(w, len(SUMMED[n])) if n in SUMMED else w for n, w in layer.items()}


@functools.partial(
  jax.jit, static_argnames=("config", "vocab", "dtype", "image_head", "transposed")
)
def prepare(
  params: dict,
  *,
  config: ModelConfig,
  vocab: VocabLayout,
  dtype: str = "compute",
  image_head: bool = True,
  transposed: bool = False,
) -> DecodeParams:
  """Prepares a model's parameters once for all later calls. Needs a current mesh.

  `dtype` is one of `DTYPES`. With "int8", the matrices of the blocks are int8, and all other
  parameters have the compute dtype. `image_head` is whether to store a separate copy of the part of
  the output table for image codes. `transposed` is whether to store matrices as `Transposed`.
  """

  def columns(rows: Float[Array, "V D"]) -> Float[Array, "D V"] | Transposed:
    if transposed:
      return Transposed(shard(rows, head_axis(len(rows)), None))
    return shard(rows.T, None, head_axis(len(rows)))

  params = jax.tree.map(lambda x: x.astype(jnp.dtype(config.dtype)), params)
  table = transformer.bind(config, params).output_table()
  images_first = jnp.roll(shard(table, None, None), vocab.image_size, axis=0)
  layers = [_at(params["blocks"], i) for i in range(config.num_layers)]
  blocks = tuple(prepare_layer(layer, dtype, transposed) for layer in layers)
  return DecodeParams(
    {**params, "blocks": blocks},
    columns(images_first[: vocab.image_size]) if image_head else None,
    columns(images_first),
  )
