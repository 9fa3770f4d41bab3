"""Parameters as decoding reads them: in the compute dtype or int8, the output table's image rows by themselves."""

# D width, V vocabulary, I image codes.

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cm3leon_jax.mesh import RULES, shard
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.vocab import VocabLayout

DTYPES = ("compute", "int8")
SUMMED = {
  "qkv": (1,),
  "out": (0, 1),
  "up": (0,),
  "gate": (0,),
  "down": (0,),
}  # Of a block's products: what is summed over.


class Int8(NamedTuple):
  """A matrix as int8 times an fp32 scale for every output, largest absolute entry / 127."""

  values: jax.Array
  scale: jax.Array


class Weights(NamedTuple):
  """See `prepare`.

  Attributes:
    params: of the Transformer, in the compute dtype; `blocks` is a tuple of the layers' parameters, with q, k and v apart, each
      matrix an array of its own (XLA would copy a part of a stacked one before each product), or `Int8`.
    image_head: [D, I] columns of the output table for image codes; None: they are not computed by themselves.
    head: [D, V] the output table, image codes first, then text: a code's place, and with it the noise of its draw, is the same
      as among the codes alone.
  """

  params: dict
  image_head: jax.Array | None
  head: jax.Array


def quantized(w, summed: tuple[int, ...]) -> Int8:
  scale = jnp.maximum(jnp.max(jnp.abs(w), axis=summed, keepdims=True) / 127, 1e-30)
  return Int8(jnp.round(w / scale).astype(jnp.int8), scale.astype(jnp.float32))


def dequantized(tree, dtype):
  """The tree with every `Int8` as a matrix of `dtype`."""
  is_int8 = lambda x: isinstance(x, Int8)
  matrix = lambda x: (x.values.astype(jnp.float32) * x.scale).astype(dtype) if is_int8(x) else x
  return jax.tree.map(matrix, tree, is_leaf=is_int8)


def head_ids(vocab: VocabLayout):
  """[V] int32, the id of each column of `Weights.head`."""
  return jnp.roll(jnp.arange(vocab.size, dtype=jnp.int32), vocab.image_size)


def head_axis(rows: int) -> str | None:
  """Rows of the output table are split like the vocabulary if they divide."""
  return None if rows % jax.sharding.get_abstract_mesh().shape[RULES["vocab"]] else "vocab"


@functools.partial(jax.jit, static_argnames=("config", "vocab", "dtype", "image_head"))
def prepare(
  params,
  *,
  config: ModelConfig,
  vocab: VocabLayout,
  dtype: str = "compute",
  image_head: bool = True,
) -> Weights:
  """Done once for many calls. Needs a mesh.

  Args:
    params: of the model `config`.
    config: static.
    vocab: static.
    dtype: of `DTYPES`: the compute dtype for all, or int8 for the products of the blocks.
    image_head: whether the image rows of the output table are kept by themselves, too.
  """
  params = jax.tree.map(lambda x: x.astype(jnp.dtype(config.dtype)), params)
  table = transformer.bind(config, params).output_table()
  columns = lambda rows: shard(rows.T, None, head_axis(len(rows)))
  images_first = jnp.roll(shard(table, None, None), vocab.image_size, axis=0)
  among_codes = columns(images_first[: vocab.image_size]) if image_head else None
  layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(config.num_layers)]
  if dtype == "int8":
    layers = [
      {name: quantized(w, SUMMED[name]) if name in SUMMED else w for name, w in layer.items()}
      for layer in layers
    ]
  apart = lambda w: tuple(jax.tree.map(lambda x, i=i: x[i], w) for i in range(3))
  params = {**params, "blocks": tuple({**layer, "qkv": apart(layer["qkv"])} for layer in layers)}
  return Weights(params, among_codes, columns(images_first))
