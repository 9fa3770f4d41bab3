"""Causal attention within segments: plain on any device, Pallas kernels on TPU and GPU."""

# B batch, L length (queries), T length (keys), N heads, H head size.

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as gpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
import jax.numpy as jnp

from cm3leon_jax.mesh import spec

BLOCK = 256  # Queries that look back together.


def wide(dtype):
  """The dtype of sums that must not lose digits: fp32, or fp64 of fp64."""
  return jnp.promote_types(dtype, jnp.float32)


def masked_attention(q, k, v, mask):
  """Softmax attention with scores in fp32.

  Args:
    q: [B, L, N, H].
    k: [B, T, N, H].
    v: [B, T, N, H].
    mask: [B, 1, L, T] bool; a query must see at least one key.

  Returns:
    [B, L, N, H], laid out like q.
  """
  scores = (
    jnp.einsum("BLNH,BTNH->BNLT", q, k, preferred_element_type=wide(q.dtype)) * q.shape[-1] ** -0.5
  )
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
  return jnp.einsum("BNLT,BTNH->BLNH", weights.astype(v.dtype), v)


def causal_attention(q, k, v, segment_ids):
  """Attention of packed rows: query l sees key t when t <= l and both are of one segment.

  Blocks of queries look only at the keys up to their end: half the work of a full matrix under a mask, and the scores
  of one block at a time.

    segment_ids = [1 1 2]: who sees whom is [[1 0 0] [1 1 0] [0 0 1]]

  Args:
    q: [B, L, N, H].
    k: [B, L, N, H].
    v: [B, L, N, H].
    segment_ids: [B, L] int32.

  Returns:
    [B, L, N, H].
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


def _per_shard(kernel, q, k, v, segment_ids):
  """`kernel(q, k, v, segment_ids)` on every device's batch and heads: [B, N, L, H] each but [B, L] segment_ids."""
  per_head, rows = spec("batch", "heads", "length", "head_dim"), spec("batch", "length")
  call = jax.shard_map(
    kernel, in_specs=(per_head,) * 3 + (rows,), out_specs=per_head, check_vma=False
  )
  return call(*(x.swapaxes(1, 2) for x in (q, k, v)), segment_ids).swapaxes(1, 2)


def splash_attention(q, k, v, segment_ids, interpret: bool = False):
  """The same as `causal_attention`, by the Pallas kernel of TPUs. L must be a multiple of 128."""
  length, scale = q.shape[1], q.shape[-1] ** -0.5
  block = next(b for b in (512, 384, 256, 128) if length % b == 0)
  blocks = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )

  def local(q, k, v, segment_ids):
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * q.shape[1])
    kernel = splash.make_splash_mha(
      mask=mask,
      head_shards=1,
      q_seq_shards=1,
      block_sizes=blocks,
      residual_checkpoint_name="attention",
      interpret=interpret,
    )
    one = lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s))
    return jax.vmap(one)(q * scale, k, v, segment_ids)

  return _per_shard(local, q, k, v, segment_ids)


def triton_attention(q, k, v, segment_ids, interpret: bool = False):
  """The same as `causal_attention`, by the Pallas kernel of GPUs. L must be a multiple of 128, H a power of two."""

  def local(q, k, v, segment_ids):
    rows_first = (x.swapaxes(1, 2) for x in (q, k, v))
    out = gpu.mha(
      *rows_first, segment_ids, sm_scale=q.shape[-1] ** -0.5, causal=True, interpret=interpret
    )
    return out.swapaxes(1, 2)

  return checkpoint_name(_per_shard(local, q, k, v, segment_ids), "attention")


def row_attention(name: str, q, k, v, segment_ids):
  """Attention by the function that `name`, of `config.ATTENTIONS`, stands for.

  `auto`: the kernel of the mesh's devices where the shapes allow it, else plain.

  Raises:
    ValueError: the kernel asked for cannot take these shapes.
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
      f"attention '{name}' takes rows of a multiple of 128, triton heads of 2^n; here {length} and {head_dim}."
    )
  return {"plain": causal_attention, "splash": splash_attention, "triton": triton_attention}[name](
    q, k, v, segment_ids
  )
