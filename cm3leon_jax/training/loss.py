"""Cross-entropy over a vocabulary that is split over the mesh, in chunks of tokens."""

# B batch, L length, C tokens of a chunk, D width, V vocabulary.

import jax
import jax.numpy as jnp

from cm3leon_jax.mesh import spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.transformer import Transformer


def cross_entropy(logits, targets):
  """Negative log-likelihood of each target.

  Every sum over V is local to a shard of `tensor` and followed by one reduction of [B, L]: a gather from a split
  vocabulary would need all of it.

  Args:
    logits: [B, L, V] fp32, V may be split.
    targets: [B, L] int32.

  Returns:
    [B, L] fp32, nats.
  """
  ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2, out_sharding=spec(None, None, "vocab"))
  chosen = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), -1)
  return jax.nn.logsumexp(logits, -1) - chosen


def chunked_nll(hidden, table, targets, chunk: int):
  """`cross_entropy(hidden @ table.T, targets)` with the logits of at most `chunk` tokens of each row at a time.

  Backward recomputes a chunk's logits, so that none outlive it.

  Args:
    hidden: [B, L, D].
    table: [V, D], split by vocabulary.
    targets: [B, L] int32.
    chunk: wanted C; the largest divisor of L up to it is taken.

  Returns:
    [B, L] fp32, nats.
  """
  B, L, D = hidden.shape
  C = max(c for c in range(1, min(chunk, L) + 1) if L % c == 0)
  rows = ("batch", "length", None)
  hidden = hidden.reshape(B, L // C, C, D, out_sharding=spec(*rows, "act")).swapaxes(0, 1)
  targets = targets.reshape(B, L // C, C, out_sharding=spec(*rows)).swapaxes(0, 1)

  @jax.checkpoint
  def one(_, xs):
    h, t = xs
    return None, cross_entropy(transformer.logits(h, table), t)

  _, nll = jax.lax.scan(one, None, (hidden, targets))
  return nll.swapaxes(0, 1).reshape(B, L, out_sharding=spec("batch", "length"))


def token_nll(model: Transformer, batch) -> jax.Array:
  """Negative log-likelihood of every target of a batch.

  Args:
    model: the decoder.
    batch: [B, L] arrays inputs, targets, segment_ids, positions.

  Returns:
    [B, L] fp32, nats; padding included (its weight is 0).
  """
  hidden = model(batch["inputs"], batch["positions"], batch["segment_ids"])
  return chunked_nll(hidden, model.output_table(), batch["targets"], model.config.loss_chunk)


def modality_sums(nll, targets, weights, text_size: int) -> dict[str, jax.Array]:
  """Weighted sums of nll and the sums of weights, for all targets, image codes and the rest (text and special tokens)."""
  image = (targets >= text_size).astype(weights.dtype)
  parts = {"": weights, "image_": weights * image, "text_": weights * (1 - image)}
  return {
    f"{name}{kind}": jnp.sum(w * x) for name, w in parts.items() for kind, x in (("nll", nll), ("weight", jnp.ones_like(nll)))
  }


def modality_losses(sums) -> dict[str, jax.Array]:
  """Mean nats per target: `loss`, `image_loss`, `text_loss`; 0 where there is no such target."""
  return {f"{name}loss": sums[f"{name}nll"] / jnp.maximum(sums[f"{name}weight"], 1e-9) for name in ("", "image_", "text_")}
