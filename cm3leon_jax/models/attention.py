"""Implements causal attention within segments, in plain JAX and with Pallas kernels."""

# B batch, L length (queries), T length (keys), N heads, G key and value heads, H head size.

from collections.abc import Callable
from typing import TypeAlias

from etils import epy
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int32
import numpy as np

from cm3leon_jax.mesh import spec

with epy.lazy_imports():  # Only accelerators need the kernels of Pallas.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

BLOCK = 128  # Number of queries in one block of `causal_attention`.
Heads: TypeAlias = Float[Array, "B L N H"]
KeyHeads: TypeAlias = Float[Array, "B T G H"]
PerHead: TypeAlias = Float[Array, "B _ L H"]
Ids: TypeAlias = Int32[Array, "B L"]


def wide(dtype: DTypeLike) -> np.dtype:
  """Returns the dtype for sums that need full precision: fp64 for fp64 inputs, otherwise fp32."""
  return jnp.promote_types(dtype, jnp.float32)


def by_key_head(attend: Callable[[Array], Array], q: Heads, key_heads: int) -> Heads:
  """Calls `attend` with the heads that share key heads on a mapped axis, so no key is repeated.

  `attend` maps queries of G heads to the result of attention. Adjacent heads share a key head.
  """
  heads = ("heads", "head_dim")
  if (shared := q.shape[2] // key_heads) == 1:
    return attend(q)
  grouped = jnp.reshape(
    q,
    (*q.shape[:2], key_heads, shared, q.shape[3]),
    out_sharding=spec("batch", "length", "heads", None, "head_dim"),
  )
  out = jax.vmap(attend, in_axes=3, out_axes=3)(grouped)
  return jnp.reshape(out, q.shape, out_sharding=spec("batch", "length", *heads))


def masked_attention(q: Heads, k: KeyHeads, v: KeyHeads, mask: Bool[Array, "B 1 L T"]) -> Heads:
  """Computes softmax attention with scores in fp32. The result has the sharding of `q`.

  `mask` is True where a query may attend to a key. Every query must attend to at least one key.
  """

  def attend(q: Float[Array, "B L G H"]) -> Float[Array, "B L G H"]:
    scores = jnp.einsum("BLGH,BTGH->BGLT", q, k, preferred_element_type=wide(q.dtype))
    scores *= q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("BGLT,BTGH->BLGH", weights.astype(v.dtype), v)

  return by_key_head(attend, q, k.shape[2])


def causal_attention(q: Heads, k: KeyHeads, v: KeyHeads, segment_ids: Ids) -> Heads:
  """Computes attention in packed rows: a query attends to its segment up to its own position.

  Each block of queries uses only the keys up to the end of the block, which takes half the work of
  the full matrix of scores. Only the scores of one block are in memory.

    segment_ids = [1 1 2], mask [query, key] = [[1 0 0] [1 1 0] [0 0 1]]
  """
  length, blocks = q.shape[1], []
  for start in range(0, length, BLOCK):
    stop = min(start + BLOCK, length)
    causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
    mask = causal[None, None] & (
      segment_ids[:, None, start:stop, None] == segment_ids[:, None, None, :stop]
    )
    blocks.append(masked_attention(q[:, start:stop], k[:, :stop], v[:, :stop], mask))
  return checkpoint_name(jnp.concatenate(blocks, axis=1), "attention")


def _per_shard(
  kernel: Callable[..., Array], q: Heads, k: KeyHeads, v: KeyHeads, segment_ids: Ids
) -> Heads:
  """Calls `kernel` with each device's shard of q, k and v as [B, heads, L, H].

  Shards split the batch and the heads.
  """
  per_head, rows = spec("batch", "heads", "length", "head_dim"), spec("batch", "length")
  call = jax.shard_map(
    kernel, in_specs=(per_head,) * 3 + (rows,), out_specs=per_head, check_vma=False
  )
  return call(*(x.swapaxes(1, 2) for x in (q, k, v)), segment_ids).swapaxes(1, 2)


def splash_attention(
  q: Heads, k: KeyHeads, v: KeyHeads, segment_ids: Ids, interpret: bool = False
) -> Heads:
  """Computes `causal_attention` with a Pallas kernel for TPUs. L must be a multiple of 128."""
  length, scale = q.shape[1], q.shape[-1] ** -0.5
  block = next(b for b in (512, 384, 256, 128) if length % b == 0)
  sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  blocks = splash.BlockSizes(**dict.fromkeys(sizes, block))

  def local(q: PerHead, k: PerHead, v: PerHead, segment_ids: Ids) -> PerHead:
    kernel = splash.make_splash_mha_single_device(
      splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * q.shape[1]),
      block_sizes=blocks,
      residual_checkpoint_name="attention",
      interpret=interpret,
    )
    ids = splash.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(q * scale, k, v, ids)

  return _per_shard(local, q, k, v, segment_ids)


def triton_attention(
  q: Heads, k: KeyHeads, v: KeyHeads, segment_ids: Ids, interpret: bool = False
) -> Heads:
  """Computes `causal_attention` with a Pallas kernel for GPUs.

  L must be a multiple of 128, and H must be a power of two.
  """
  # jax 0.12 warns about this import, so it happens only if the kernel is used.
  from jax.experimental.pallas.ops.gpu import attention as gpu

  def local(q: PerHead, k: PerHead, v: PerHead, segment_ids: Ids) -> PerHead:
    rows_first = (x.swapaxes(1, 2) for x in (q, k, v))
    out = gpu.mha(
      *rows_first, segment_ids, sm_scale=q.shape[-1] ** -0.5, causal=True, interpret=interpret
    )
    return out.swapaxes(1, 2)

  # The kernel needs a key head for each head.
  out = by_key_head(lambda q: _per_shard(local, q, k, v, segment_ids), q, k.shape[2])
  return checkpoint_name(out, "attention")


def row_attention(name: str, q: Heads, k: KeyHeads, v: KeyHeads, segment_ids: Ids) -> Heads:
  """Computes `causal_attention` with the implementation `name`, one of `config.ATTENTIONS`.

  `auto` uses the Pallas kernel for the mesh's devices if it supports these shapes, and plain
  attention otherwise.

  Raises:
    ValueError: the kernel does not support these shapes.
  """
  length, head_dim = q.shape[1], q.shape[3]
  fits = {
    "plain": True,
    "splash": length % 128 == 0,
    "triton": length % 128 == 0 and head_dim & (head_dim - 1) == 0,
  }
  if name == "auto":
    kernel = {"tpu": "splash", "gpu": "triton"}.get(
      jax.sharding.get_abstract_mesh().abstract_device.platform, "plain"
    )
    name = kernel if fits[kernel] else "plain"
  if not fits[name]:
    raise ValueError(
      f"attention '{name}' needs rows of a multiple of 128 tokens, and 'triton' also a head size "
      f"that is a power of two; a row has {length} tokens, and the head size is {head_dim}."
    )
  return {"plain": causal_attention, "splash": splash_attention, "triton": triton_attention}[name](
    q, k, v, segment_ids
  )
