"""The static key-value cache of decoding, and attention of new tokens over it."""

# K layers, R rows (streams x prompts), N heads, T slots, L new tokens, H head size.

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cm3leon_jax.mesh import spec
from cm3leon_jax.models.config import ModelConfig


class Cache(NamedTuple):
  """Keys and values of every layer, [K, R, N, T, H] in the compute dtype, split by rows and heads.

  It lives in the carry of the scans over layers and steps and is updated in place.
  """

  keys: jax.Array
  values: jax.Array

  @classmethod
  def empty(cls, config: ModelConfig, rows: int, slots: int) -> "Cache":
    shape = (config.num_layers, rows, config.num_heads, slots, config.head_dim)
    zeros = lambda: jnp.zeros(shape, config.dtype, out_sharding=spec("layers", "batch", "heads", "length", "head_dim"))
    return cls(zeros(), zeros())

  def write(self, layer, slot, k, v) -> "Cache":
    """Puts k and v, [R, L, N, H], into slots [slot, slot + L) of one layer."""
    put = lambda cache, x: jax.lax.dynamic_update_slice(cache, x.swapaxes(1, 2)[None], (layer, 0, 0, slot, 0))
    return Cache(put(self.keys, k), put(self.values, v))

  def attend(self, layer, q, mask):
    """Softmax attention of new queries over the slots of one layer, scores in fp32.

    Args:
      layer: index, may be traced.
      q: [R, L, N, H].
      mask: [R, 1, L, T] bool; a query must see at least one slot.

    Returns:
      [R, L, N, H], laid out like q.
    """
    keys, values = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in self)
    scores = jnp.einsum("RLNH,RNTH->RNLT", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    heads = spec("batch", "length", "heads", "head_dim")
    return jnp.einsum("RNLT,RNTH->RLNH", weights.astype(values.dtype), values, out_sharding=heads)
