"""Implements the key-value cache of decoding, and attention over the entries of the cache."""

# K layers, B samples, S guidance streams, R rows (B x S, or prompts), N heads, G key heads, T
# entries, L new tokens, H head size.

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, Int32, Shaped

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.models.attention import by_key_head, wide

DTYPES = ("compute", "int8")
AXES = ("batch", "heads", "length", "head_dim")
Read: TypeAlias = Float[Array, "R L _ H"]  # Queries, keys or values of new tokens.
Size: TypeAlias = Any  # An int or a symbolic dimension of `jax.export`.


class LayerCache(NamedTuple):
  """Cached keys and values of one layer. The decoding loop updates them in place.

  Each layer has separate arrays, because XLA would copy a layer's slice of a stacked array before
  each product.

  Attributes:
    keys, values: sharded over rows and heads, in the compute dtype or int8.
    key_scales, value_scales: scales of an int8 cache. The scale of a key or value vector is its
      largest absolute entry, divided by 127. None for other dtypes.
  """

  keys: Shaped[Array, "R G T H"]
  values: Shaped[Array, "R G T H"]
  key_scales: Float32[Array, "R G T 1"] | None = None
  value_scales: Float32[Array, "R G T 1"] | None = None

  def write(
    self, entry: int | Int[Array, ""], k: Float[Array, "R L G H"], v: Float[Array, "R L G H"]
  ) -> "LayerCache":
    """Writes `k` and `v` to entries [entry, entry + L)."""

    def put(into: Array, x: Array) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(into, x, entry, axis=2)

    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if self.key_scales is None:
      return LayerCache(put(self.keys, k), put(self.values, v))
    (k, k_scales), (v, v_scales) = _quantized(k), _quantized(v)
    scales = put(self.key_scales, k_scales), put(self.value_scales, v_scales)
    return LayerCache(put(self.keys, k), put(self.values, v), *scales)

  def attend(
    self, q: Float[Array, "R L N H"], mask: Bool[Array, "R 1 #L T"]
  ) -> Float[Array, "R L N H"]:
    """Computes softmax attention of new queries over the entries, with scores in fp32.

    `mask` is True where a query may attend to an entry. Every query must attend to at least one
    entry. The result has the sharding of `q`.
    """
    keys, values = self.keys.astype(q.dtype), self.values.astype(q.dtype)

    def attend(q: Float[Array, "R L G H"]) -> Float[Array, "R L G H"]:
      scores = jnp.einsum("RLGH,RGTH->RGLT", q, keys, preferred_element_type=wide(q.dtype))
      scores *= q.shape[-1] ** -0.5
      if self.key_scales is not None:
        scores *= self.key_scales.swapaxes(2, 3)
      weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
      if self.value_scales is not None:
        weights *= self.value_scales.swapaxes(2, 3)
      heads = spec("batch", "length", "heads", "head_dim")
      return jnp.einsum("RGLT,RGTH->RLGH", weights.astype(q.dtype), values, out_sharding=heads)

    return by_key_head(attend, q, keys.shape[1])


Layers: TypeAlias = tuple[LayerCache, ...]  # Caches of all layers for one stream.


def over_streams(
  layers: list[list[LayerCache]],
  masks: Sequence[Bool[Array, "B 1 #L _"]],
  write: Callable[[LayerCache, int, Read, Read], LayerCache],
) -> Callable[[int, Read, Read, Read], Read]:
  """Makes the `attend` function of `loop.extend` for S streams with separate caches.

  Args:
    layers: caches by layer and stream; the returned function replaces them after each write.
    masks: one mask per stream; see `LayerCache.attend`.
    write: a function (cache, stream, k, v) -> cache, with k and v of shape [B, L, G, H].

  Returns:
    A function (layer, q, k, v) -> result, with q and result of shape [R, L, N, H] and k and v of
    shape [R, L, G, H]. The streams of a sample are adjacent rows.
  """
  streams, heads = len(masks), ("length", "heads", "head_dim")

  def by_stream(x: Read) -> Float[Array, "B S L _ H"]:
    return jnp.reshape(x, (-1, streams, *x.shape[1:]), out_sharding=spec("batch", None, *heads))

  def attend(i: int, q: Read, k: Read, v: Read) -> Read:
    q, k, v = by_stream(q), by_stream(k), by_stream(v)
    attended = []
    for s, mask in enumerate(masks):
      layers[i][s] = write(layers[i][s], s, k[:, s], v[:, s])
      attended.append(layers[i][s].attend(q[:, s], mask))
    out = jnp.stack(attended, axis=1)
    return jnp.reshape(out, (-1, *out.shape[2:]), out_sharding=spec("batch", *heads))

  return attend


def empty(config: ModelConfig, rows: Size, capacity: Size, dtype: str = "compute") -> Layers:
  """Makes a cache with `capacity` empty entries for each layer. `dtype` is one of `DTYPES`."""

  def zeros(dtype: DTypeLike, size: int = config.head_dim) -> Shaped[Array, "R G T size"]:
    shape = (rows, config.key_heads, capacity, size)
    return jnp.zeros(shape, dtype, out_sharding=spec(*AXES))

  def layer() -> LayerCache:
    if dtype != "int8":
      return LayerCache(zeros(config.dtype), zeros(config.dtype))
    scales = zeros(jnp.float32, 1), zeros(jnp.float32, 1)
    return LayerCache(zeros(jnp.int8), zeros(jnp.int8), *scales)

  return tuple(layer() for _ in range(config.num_layers))


def rows(cache: Layers, index: Int32[Array, " rows"], kept: Size, capacity: Size) -> Layers:
  """Gathers cache rows (see `local_rows`), keeps the last `kept` entries, pads to `capacity`."""

  def take(x: Shaped[Array, "R G T H"]) -> Shaped[Array, "rows G kept H"]:
    return local_rows(x[:, :, x.shape[2] - kept :], index)

  return grown(jax.tree.map(take, cache), capacity - kept)


def local_rows(
  x: Shaped[Array, "rows_in ..."], index: Int32[Array, " rows"]
) -> Shaped[Array, "rows ..."]:
  """Gathers rows of `x` without communication between devices. `x` is sharded over the batch.

  `index` contains indices of rows of `x`. Each index must refer to a row in the same shard as the
  result row.
  """
  sharding = jax.typeof(x).sharding
  split = sharding.spec

  def take(x: Array, index: Array) -> Array:
    return x[index % x.shape[0]]

  if sharding.mesh.empty:  # `mesh.unsplit` traces programs without a mesh.
    return take(x, index)
  return jax.shard_map(take, in_specs=(split, spec("batch")), out_specs=split)(
    x, shard(index, "batch")
  )


def grown(cache: Layers, by: Size) -> Layers:
  """Appends `by` empty entries to each row."""
  return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, by), (0, 0))), cache)


def _quantized(
  x: Float[Array, "*batch H"],
) -> tuple[Int8[Array, "*batch H"], Float32[Array, "*batch 1"]]:
  """Quantizes vectors. Returns (int8 values, fp32 scales), where values * scales is about `x`."""
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127, 1e-30)
  return jnp.round(x / scale).astype(jnp.int8), scale
