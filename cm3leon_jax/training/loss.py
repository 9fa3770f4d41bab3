"""Cross-entropy over a vocabulary that is split over the mesh, in chunks of tokens, with its own backward pass."""

# B batch, L length, C tokens of a chunk, D width, V vocabulary; lower case: what one device holds of it.

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cm3leon_jax.mesh import FSDP, RULES, spec
from cm3leon_jax.models.transformer import Transformer

SCATTER_WIDTH = 256  # Columns of the table's gradient that are summed over devices at a time.


class Gradients(NamedTuple):
  """Of the weighted sum, by the final hidden states [B, L, D] and by the stored table [V, D], in their dtypes."""

  hidden: jax.Array
  table: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_nll(hidden, table, targets, weights, chunk: int, z_loss: float = 0.0):
  """Sum over tokens of weight x (nll + z_loss x log(Z)^2), where nll is the cross-entropy of `hidden @ table.T`.

  The gradient by the logits, softmax minus target, is at hand as soon as they are: so both products of the backward pass are
  done chunk by chunk in the forward pass, and no logits are kept or computed twice. Sums over V are local to a shard of
  `tensor`, followed by a reduction of one number a token; the table's gradient is reduce-scattered to how it is stored.

  Args:
    hidden: [B, L, D].
    table: [V, D], split by vocabulary as it is stored; in the dtype of `hidden`.
    targets: [B, L] int32.
    weights: [B, L] fp32; no gradient is taken by them.
    chunk: wanted C; the largest divisor of L up to it is taken.
    z_loss: weight of the squared log of the softmax's normalizer (PaLM, section 5); it keeps logits from drifting.

  Returns:
    The sum, fp32, and nll, [B, L] fp32, nats; only the sum has a gradient.
  """
  return _value(
    *_over_mesh(hidden, table, targets, weights, chunk, z_loss, gradients=False)[0], weights, z_loss
  )


def _forward(hidden, table, targets, weights, chunk, z_loss):
  (nll, log_z), gradients = _over_mesh(
    hidden, table, targets, weights, chunk, z_loss, gradients=True
  )
  return _value(nll, log_z, weights, z_loss), gradients


def _backward(chunk, z_loss, gradients, cotangents):
  scale = lambda x: (x * cotangents[0]).astype(x.dtype)
  return scale(gradients.hidden), scale(gradients.table), None, None


weighted_nll.defvjp(_forward, _backward)


def _value(nll, log_z, weights, z_loss):
  return jnp.sum(weights * (nll + z_loss * log_z**2)), nll


def _divisor(n: int, most: int) -> int:
  """The largest divisor of n up to `most`."""
  return max(d for d in range(1, min(most, n) + 1) if n % d == 0)


def _over_mesh(hidden, table, targets, weights, chunk, z_loss, gradients: bool):
  """nll and log Z, [B, L] each, and the `Gradients` or None: `_on_device` on every device's tokens and rows of the table."""
  C = _divisor(hidden.shape[1], chunk)
  tokens, states, rows = (
    spec("batch", "length"),
    spec("batch", "length", "act"),
    spec("vocab_stored", None),
  )
  return jax.shard_map(
    functools.partial(_on_device, C, z_loss, gradients),
    in_specs=(states, rows, tokens, tokens),
    out_specs=((tokens, tokens), Gradients(states, rows) if gradients else None),
    check_vma=False,
  )(hidden, table, targets, weights)


def _on_device(C, z_loss, gradients, hidden, table, targets, weights):
  tensor = RULES["vocab"]
  # Without this XLA keeps the table that it gathered for the embedding, and a buffer for its gradient, through all layers.
  hidden, rows, zero = jax.lax.optimization_barrier((hidden, table, jnp.zeros((), jnp.float32)))
  for axis in reversed(FSDP):
    rows = jax.lax.all_gather(rows, axis, tiled=True)
  ids = jax.lax.axis_index(tensor) * rows.shape[0] + jnp.arange(rows.shape[0])

  def one(table_gradient, chunk):
    h, target, weight = chunk
    logits = jnp.einsum("bCd,vd->bCv", h, rows, preferred_element_type=jnp.float32)
    top = jax.lax.pmax(jnp.max(logits, -1), tensor)
    powers = jnp.exp(logits - top[..., None])
    total = jax.lax.psum(jnp.sum(powers, -1), tensor)
    log_z = top + jnp.log(total)
    hit = ids[None, None] == target[..., None]
    nll = log_z - jax.lax.psum(jnp.sum(jnp.where(hit, logits, 0.0), -1), tensor)
    if not gradients:
      return None, (nll, log_z, None)
    share = weight * (1 + 2 * z_loss * log_z) / total
    by_logits = powers * share[..., None] - jnp.where(hit, weight[..., None], 0.0)
    by_logits = by_logits.astype(h.dtype)
    # XLA:CPU is half again as fast at [d, tokens] x [tokens, v] as at the transpose of it, if the transposed is an array.
    turned = jax.lax.optimization_barrier(h.reshape(-1, h.shape[-1]).T)
    table_gradient += jnp.matmul(
      turned, by_logits.reshape(-1, by_logits.shape[-1]), preferred_element_type=jnp.float32
    )
    return table_gradient, (
      nll,
      log_z,
      jax.lax.psum(jnp.einsum("bCv,vd->bCd", by_logits, rows), tensor),
    )

  b, L = targets.shape
  split = lambda x: x.reshape(b, L // C, C, *x.shape[2:]).swapaxes(0, 1)
  whole = lambda x: x.swapaxes(0, 1).reshape(b, L, *x.shape[3:])
  first = jnp.broadcast_to(zero, rows.shape[::-1]) if gradients else None
  by_rows, (nll, log_z, by_hidden) = jax.lax.scan(
    one, first, (split(hidden), split(targets), split(weights))
  )
  found = whole(nll), whole(log_z)
  if not gradients:
    return found, None
  by_rows = jax.lax.psum(_scattered(by_rows), "data").astype(table.dtype)
  # Nothing else keeps XLA from carrying all rows of the gradient, [v, D] in fp32, through the backward pass of the layers.
  return found, jax.lax.optimization_barrier(Gradients(whole(by_hidden), by_rows))


def _scattered(gradient):
  """Sums the table's gradient over fsdp: [D, v] fp32 -> this device's rows, [rows, D] fp32.

  The transpose exists for at most SCATTER_WIDTH columns at a time: a second array of all rows, 1 GiB
  of the 7B, would add to the loss's peak of memory.
  """
  D, v = gradient.shape
  width = _divisor(D, SCATTER_WIDTH)

  def scattered(_, start):
    piece = jax.lax.dynamic_slice(gradient, (start, 0), (width, v)).T
    for axis in FSDP:
      piece = jax.lax.psum_scatter(piece, axis, tiled=True)
    return None, piece

  _, pieces = jax.lax.scan(scattered, None, jnp.arange(0, D, width))
  return pieces.swapaxes(0, 1).reshape(-1, D)


def batch_nll(model: Transformer, batch, z_loss: float = 0.0):
  """`weighted_nll` of a batch of [B, L] arrays inputs, targets, loss_weights, segment_ids, positions.

  Returns:
    The weighted sum, fp32, and nll, [B, L] fp32, nats; padding included (its weight is 0).
  """
  hidden = model(batch["inputs"], batch["positions"], batch["segment_ids"])
  table, chunk = model.stored_table(), model.config.loss_chunk
  return weighted_nll(hidden, table, batch["targets"], batch["loss_weights"], chunk, z_loss)


def modality_sums(nll, targets, weights, text_size: int) -> dict[str, jax.Array]:
  """Weighted sums of nll and the sums of weights, for all targets, image codes and the rest (text and special tokens)."""
  image = (targets >= text_size).astype(weights.dtype)
  parts = {"": weights, "image_": weights * image, "text_": weights * (1 - image)}
  return {
    f"{name}{kind}": jnp.sum(w * x)
    for name, w in parts.items()
    for kind, x in (("nll", nll), ("weight", jnp.ones_like(nll)))
  }


def modality_losses(sums) -> dict[str, jax.Array]:
  """Mean nats per target: `loss`, `image_loss`, `text_loss`; 0 where there is no such target."""
  return {
    f"{name}loss": sums[f"{name}nll"] / jnp.maximum(sums[f"{name}weight"], 1e-9)
    for name in ("", "image_", "text_")
  }
