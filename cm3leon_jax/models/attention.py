"""Causal attention within segments: plain on any device, splash on TPU."""

# B batch, L length (queries), T length (keys), N heads, H head size.

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
import jax.numpy as jnp

from cm3leon_jax.mesh import spec

BLOCK = 256  # Queries that look back together.


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
  scores = jnp.einsum("BLNH,BTNH->BNLT", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
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
    mask = causal[None, None] & (segment_ids[:, None, start:stop, None] == segment_ids[:, None, None, :stop])
    blocks.append(masked_attention(q[:, start:stop], k[:, :stop], v[:, :stop], mask))
  return jnp.concatenate(blocks, axis=1)


def splash_attention(q, k, v, segment_ids):
  """The same as `causal_attention`, by the Pallas TPU kernel, per shard of batch and heads."""
  length, scale = q.shape[1], q.shape[-1] ** -0.5

  def local(q, k, v, segment_ids):
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * q.shape[1])
    kernel = splash_attention_kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1)
    one = lambda q, k, v, s: kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(s, s))
    return jax.vmap(one)(q, k, v, segment_ids)

  heads_first = lambda x: x.swapaxes(1, 2)
  per_head = spec("batch", "heads", "length", "head_dim")
  out = jax.shard_map(local, in_specs=(per_head,) * 3 + (spec("batch", "length"),), out_specs=per_head, check_vma=False)(
    heads_first(q) * scale, heads_first(k), heads_first(v), segment_ids
  )
  return heads_first(out)
