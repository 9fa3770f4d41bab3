"""The static key-value cache of decoding, and attention of new tokens over it."""

# K layers, B samples, S guidance streams, R rows (streams x prompts), N heads, T entries, L new
# tokens, H head size.

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, Int32, Shaped

from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.models.attention import wide
from cm3leon_jax.models.config import ModelConfig

DTYPES = ("compute", "int8")
AXES = ("batch", "heads", "length", "head_dim")
Read: TypeAlias = Float[Array, "R L N H"]  # Queries, keys or values of tokens that are read.
Size: TypeAlias = Any  # An int, or a symbolic size of `jax.export`.


class LayerCache(NamedTuple):
  """Keys and values of one layer, which the loop over steps carries and updates in place.

  Each layer has its own arrays: of a stacked array XLA would copy a layer's part before a product.

  Attributes:
    keys, values: split by rows and heads, in the compute dtype or int8.
    key_scales, value_scales: of an int8 cache, else None: largest absolute entry of each key or
      value / 127.
  """

  keys: Shaped[Array, "R N T H"]
  values: Shaped[Array, "R N T H"]
  key_scales: Float32[Array, "R N T 1"] | None = None
  value_scales: Float32[Array, "R N T 1"] | None = None

  def write(
    self, entry: int | Int[Array, ""], k: Float[Array, "R L N H"], v: Float[Array, "R L N H"]
  ) -> "LayerCache":
    """Writes k and v into entries [entry, entry + L)."""

    def put(into: Array, x: Array) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(into, x, entry, axis=2)

    return self._written(put, k, v)

  def write_rows(
    self, entries: Int32[Array, " R"], k: Float[Array, "R L N H"], v: Float[Array, "R L N H"]
  ) -> "LayerCache":
    """Writes like `write`, at an entry of each row's own."""

    def put_row(into: Array, x: Array, entry: Array) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(into, x, entry, axis=1)

    return self._written(lambda into, x: jax.vmap(put_row)(into, x, entries), k, v)

  def _written(
    self,
    put: Callable[[Array, Array], Array],
    k: Float[Array, "R L N H"],
    v: Float[Array, "R L N H"],
  ) -> "LayerCache":
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if self.key_scales is None:
      return LayerCache(put(self.keys, k), put(self.values, v))
    (k, k_scales), (v, v_scales) = _quantized(k), _quantized(v)
    scales = put(self.key_scales, k_scales), put(self.value_scales, v_scales)
    return LayerCache(put(self.keys, k), put(self.values, v), *scales)

  def attend(
    self, q: Float[Array, "R L N H"], mask: Bool[Array, "R 1 #L T"]
  ) -> Float[Array, "R L N H"]:
    """Computes softmax attention of new queries over the entries, scores in fp32; laid out like q.

    `mask` is true where a query sees an entry; every query must see at least one entry.
    """
    keys, values = self.keys.astype(q.dtype), self.values.astype(q.dtype)
    scores = (
      jnp.einsum("RLNH,RNTH->RNLT", q, keys, preferred_element_type=wide(q.dtype))
      * q.shape[-1] ** -0.5
    )
    if self.key_scales is not None:
      scores *= self.key_scales.swapaxes(2, 3)
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    if self.value_scales is not None:
      weights *= self.value_scales.swapaxes(2, 3)
    heads = spec("batch", "length", "heads", "head_dim")
    return jnp.einsum("RNLT,RNTH->RLNH", weights.astype(q.dtype), values, out_sharding=heads)


Layers: TypeAlias = tuple[LayerCache, ...]  # Of one stream.


def over_streams(
  layers: list[list[LayerCache]],
  masks: Sequence[Bool[Array, "B 1 #L _"]],
  write: Callable[[LayerCache, int, Read, Read], LayerCache],
) -> Callable[[int, Read, Read, Read], Read]:
  """Makes the `attend` of `loop.extend` for S streams that have caches of their own.

  Args:
    layers: caches of each layer and stream; written caches replace their entries.
    masks: of each stream, as in `LayerCache.attend`.
    write: (cache, stream, k, v) -> cache, with k and v [B, L, N, H].

  Returns:
    (layer, q, k, v), each [R, L, N, H], the streams of a sample side by side -> [R, L, N, H].
  """
  streams, heads = len(masks), ("length", "heads", "head_dim")

  def by_stream(x: Read) -> Float[Array, "B S L N H"]:
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
  """Makes caches of all K layers, with `capacity` empty entries, in `dtype`, one of `DTYPES`."""

  def zeros(dtype: DTypeLike, size: int = config.head_dim) -> Shaped[Array, "R N T size"]:
    shape = (rows, config.num_heads, capacity, size)
    return jnp.zeros(shape, dtype, out_sharding=spec(*AXES))

  def layer() -> LayerCache:
    if dtype != "int8":
      return LayerCache(zeros(config.dtype), zeros(config.dtype))
    scales = zeros(jnp.float32, 1), zeros(jnp.float32, 1)
    return LayerCache(zeros(jnp.int8), zeros(jnp.int8), *scales)

  return tuple(layer() for _ in range(config.num_layers))


def rows(cache: Layers, index: Int32[Array, " rows"], kept: Size, capacity: Size) -> Layers:
  """Gathers rows as `local_rows`, each with its last `kept` entries, and pads to `capacity`."""

  def take(x: Shaped[Array, "R N T H"]) -> Shaped[Array, "rows N kept H"]:
    return local_rows(x[:, :, x.shape[2] - kept :], index)

  return grown(jax.tree.map(take, cache), capacity - kept)


def local_rows(
  x: Shaped[Array, "rows_in ..."], index: Int32[Array, " rows"]
) -> Shaped[Array, "rows ..."]:
  """Gathers rows that each device has itself, so that nothing is sent.

  Args:
    x: split over the batch.
    index: of the rows of `x`, each in the shard of the row that is made of it.
  """
  sharding = jax.typeof(x).sharding
  split = sharding.spec

  def take(x: Array, index: Array) -> Array:
    return x[index % x.shape[0]]

  if sharding.mesh.empty:  # See `mesh.unsplit`.
    return take(x, index)
  return jax.shard_map(take, in_specs=(split, spec("batch")), out_specs=split)(
    x, shard(index, "batch")
  )


def grown(cache: Layers, by: Size) -> Layers:
  """Adds `by` empty entries at the end."""
  return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, by), (0, 0))), cache)


def _quantized(
  x: Float[Array, "*batch H"],
) -> tuple[Int8[Array, "*batch H"], Float32[Array, "*batch 1"]]:
  """Quantizes [..., H] to (int8 [..., H], fp32 scales [..., 1]): x is about int8 x scale."""
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127, 1e-30)
  return jnp.round(x / scale).astype(jnp.int8), scale
