"""Computes the cross-entropy over a sharded vocabulary, with a custom backward pass."""

# B batch, L length, C tokens of a chunk, D width, V vocabulary, S sources of rows. Lower-case
# letters are the sizes of one device's shard.

from collections.abc import Mapping, Sequence
import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
import numpy as np

from cm3leon_jax.mesh import FSDP, RULES, spec
from cm3leon_jax.models.transformer import Segments, Transformer

SCATTER_WIDTH = 256  # Number of columns of the table's gradient per reduce-scatter.
Ids: TypeAlias = Int32[Array, "B L"]
Values: TypeAlias = Float32[Array, "B L"]
Scalar: TypeAlias = Float32[Array, ""]
BySource: TypeAlias = Float32[Array, " S"]
SOURCE_SUMS = ("source_nll", "source_weight")


class Wanted(NamedTuple):
  """Gradients that are computed: of hidden states, and of the output table from a row, or None.

  If `tensor` splits the table, the gradients of all rows are computed.
  """

  hidden: bool = True
  first_row: int | None = 0


ALL = Wanted()


class Gradients(NamedTuple):
  """Gradients of the weighted sum, with respect to the final hidden states and the output table.

  A gradient that is not wanted is None.
  """

  hidden: Float[Array, "B L D"] | None
  table: Float[Array, "V D"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def weighted_nll(
  hidden: Float[Array, "B L D"],
  table: Float[Array, "V D"],
  targets: Ids,
  weights: Values,
  chunk: int,
  z_loss: float = 0.0,
  wanted: Wanted = ALL,
) -> tuple[Scalar, Values]:
  """Sums weight x (nll + z_loss x log(Z)^2) over tokens; nll is the cross-entropy of the targets.

  The logits are `hidden @ table.T`. Their gradient is the softmax minus the one-hot target, so it
  can be computed together with the logits. The forward pass therefore also computes both matrix
  products of the backward pass, chunk by chunk. Logits are neither stored nor computed twice.

  Each device along the mesh axis `tensor` sums over its part of V. Then one number per token is
  all-reduced. The table's gradient is reduce-scattered to the sharding of the stored table.

  Args:
    table: output table in the dtype of `hidden`, sharded by vocabulary as it is stored.
    weights: loss weights; they have no gradient.
    chunk: upper bound of C, which is the largest divisor of L up to this bound.
    z_loss: weight of the squared log of the softmax normalizer (PaLM, section 5), which keeps
      logits from drifting.
    wanted: the gradients that are needed.

  Returns:
    The sum, and nll in nats. Only the sum has a gradient.
  """
  return _over_mesh(False, hidden, table, targets, weights, chunk, z_loss, wanted)[0]


def _backward(
  chunk: int,
  z_loss: float,
  wanted: Wanted,
  gradients: Gradients,
  cotangents: tuple[Scalar, Values],
) -> tuple[Float[Array, "B L D"] | None, Float[Array, "V D"] | None, None, None]:
  by_hidden, by_table = jax.tree.map(lambda x: (x * cotangents[0]).astype(x.dtype), gradients)
  return by_hidden, by_table, None, None


def _divisor(n: int, most: int) -> int:
  """Returns the largest divisor of n that is at most `most`."""
  return max(d for d in range(1, min(most, n) + 1) if n % d == 0)


def _over_mesh(
  gradients: bool, hidden: Float[Array, "B L D"], table: Float[Array, "V D"], targets: Ids,
  weights: Values, chunk: int, z_loss: float, wanted: Wanted,
) -> tuple[tuple[Scalar, Values], Gradients | None]:  # fmt: skip
  """Runs `_on_device` on every device's shard of the tokens and of the table.

  Returns the result of `weighted_nll`, and the `Gradients` or None.
  """
  C = _divisor(hidden.shape[1], chunk)
  tokens, rows = spec("batch", "length"), spec("vocab_stored", None)
  states = spec("batch", "length", "act")
  found_specs = Gradients(states if wanted.hidden else None, rows) if gradients else None
  if found_specs and wanted.first_row is None:
    found_specs = found_specs._replace(table=None)
  (nll, log_z), result = jax.shard_map(
    functools.partial(_on_device, C, z_loss, gradients, wanted),
    in_specs=(states, rows, tokens, tokens),
    out_specs=((tokens, tokens), found_specs),
    check_vma=False,
  )(hidden, table, targets, weights)
  return (jnp.sum(weights * (nll + z_loss * log_z**2)), nll), result


weighted_nll.defvjp(functools.partial(_over_mesh, True), _backward)


def _on_device(
  C: int, z_loss: float, gradients: bool, wanted: Wanted, hidden: Float[Array, "b L D"],
  table: Float[Array, "rows D"], targets: Int32[Array, "b L"], weights: Float32[Array, "b L"],
) -> tuple[tuple[Float32[Array, "b L"], Float32[Array, "b L"]], Gradients | None]:  # fmt: skip
  tensor = RULES["vocab"]
  # Without this barrier XLA keeps the table that was gathered for the embedding, and a buffer for
  # the table's gradient, in memory through all layers.
  hidden, rows, zero = jax.lax.optimization_barrier((hidden, table, jnp.zeros((), jnp.float32)))
  for axis in reversed(FSDP):
    rows = jax.lax.all_gather(rows, axis, tiled=True)
  ids = jax.lax.axis_index(tensor) * rows.shape[0] + jnp.arange(rows.shape[0])
  first = (wanted.first_row or 0) * (jax.lax.axis_size(tensor) == 1)

  def chunk_nll(
    table_gradient: Float32[Array, "D v"] | None, chunk: tuple[Array, Array, Array]
  ) -> tuple[Float32[Array, "D v"] | None, tuple[Array, Array, Array | None]]:
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
    if table_gradient is not None:
      table_gradient += _by_rows(h, by_logits[..., first:])
    by_hidden = jnp.einsum("bCv,vd->bCd", by_logits, rows) if wanted.hidden else None
    return table_gradient, (nll, log_z, jax.lax.psum(by_hidden, tensor))

  b, L = targets.shape

  def split(x: Array) -> Array:
    return x.reshape(b, L // C, C, *x.shape[2:]).swapaxes(0, 1)

  def whole(x: Array) -> Array:
    return x.swapaxes(0, 1).reshape(b, L, *x.shape[3:])

  start = None
  if gradients and wanted.first_row is not None:
    start = jnp.broadcast_to(zero, (rows.shape[1], rows.shape[0] - first))
  by_rows, (nll, log_z, by_hidden) = jax.lax.scan(
    chunk_nll, start, (split(hidden), split(targets), split(weights))
  )
  values = whole(nll), whole(log_z)
  if not gradients:
    return values, None
  by_hidden = jax.tree.map(whole, by_hidden)
  if by_rows is None:
    return values, Gradients(by_hidden, None)
  by_rows = jnp.pad(by_rows, ((0, 0), (first, 0)))
  by_rows = jax.lax.psum(_scattered(by_rows), "data").astype(table.dtype)
  # Without this barrier XLA keeps the whole gradient, [v, D] fp32, in memory through the layers'
  # backward pass.
  return values, jax.lax.optimization_barrier(Gradients(by_hidden, by_rows))


def _by_rows(h: Float[Array, "b C d"], by_logits: Float[Array, "b C v"]) -> Float32[Array, "d v"]:
  """Computes the gradient of the table of a chunk."""
  # On CPU, XLA computes [d, tokens] x [tokens, v] 1.5 times as fast as its transpose, if the left
  # matrix is materialized.
  transposed = jax.lax.optimization_barrier(h.reshape(-1, h.shape[-1]).T)
  flat = by_logits.reshape(-1, by_logits.shape[-1])
  return jnp.matmul(transposed, flat, preferred_element_type=jnp.float32)


def _scattered(gradient: Float32[Array, "D v"]) -> Float32[Array, "rows D"]:
  """Reduce-scatters the table's gradient over the fsdp axes; returns the rows of this device.

  Only SCATTER_WIDTH columns are transposed at a time. Transposing all columns together would need a
  second array (1 GiB for the 7B model) and raise the peak memory of the loss.
  """
  D, v = gradient.shape
  width = _divisor(D, SCATTER_WIDTH)

  def scattered(_: None, start: Int32[Array, ""]) -> tuple[None, Float32[Array, "rows width"]]:
    piece = jax.lax.dynamic_slice(gradient, (start, 0), (width, v)).T
    for axis in FSDP:
      piece = jax.lax.psum_scatter(piece, axis, tiled=True)
    return None, piece

  _, pieces = jax.lax.scan(scattered, None, jnp.arange(0, D, width))
  return pieces.swapaxes(0, 1).reshape(-1, D)


def batch_nll(
  model: Transformer,
  batch: dict[str, Ids | Values],
  z_loss: float = 0.0,
  adapters: dict | None = None,
  segments: Segments | None = None,
  wanted: Wanted = ALL,
) -> tuple[Scalar, Values]:
  """Runs the model on a batch and computes `weighted_nll`.

  `batch` has inputs, targets, loss_weights, segment_ids and positions. For `adapters` and
  `segments`, see `Transformer`. Returns the weighted sum, and nll in nats. nll also has values at
  padding, whose weight is 0.
  """
  hidden = model(batch["inputs"], batch["positions"], batch["segment_ids"], adapters, segments)
  table, chunk = model.stored_table(), model.config.loss_chunk
  targets, weights = batch["targets"], batch["loss_weights"]
  return weighted_nll(hidden, table, targets, weights, chunk, z_loss, wanted)


def modality_sums(nll: Values, targets: Ids, weights: Values, text_size: int) -> dict[str, Scalar]:
  """Sums weight x nll, and the weights: over all targets, only image codes, and only other ids."""
  image = (targets >= text_size).astype(weights.dtype)
  parts = {"": weights, "image_": weights * image, "text_": weights * (1 - image)}
  return {
    f"{name}{kind}": jnp.sum(w * x)
    for name, w in parts.items()
    for kind, x in (("nll", nll), ("weight", jnp.ones_like(nll)))
  }


def modality_losses(sums: dict) -> dict:
  """Computes mean losses in nats per target from the sums of `modality_sums`.

  Returns the scalars `loss`, `image_loss` and `text_loss`. The loss of a modality without targets
  is 0.
  """
  return {
    f"{name}loss": sums[f"{name}nll"] / jnp.maximum(sums[f"{name}weight"], 1e-9)
    for name in ("", "image_", "text_")
  }


def source_sums(
  nll: Values, weights: Values, sources: Ids, num_sources: int
) -> dict[str, BySource]:
  """Sums weight x nll, and sums the weights, over the targets of each source of rows.

    nll [1 2 4 9], weights [1 1 .5 0], sources [1 1 3 0], num_sources 3
    source_nll = [3 0 2], source_weight = [2 0 .5]

  `nll` is in nats. `sources` counts from 1; 0 means that the target has no source. `num_sources`
  (S) is static.
  """
  numbers = jnp.arange(1, num_sources + 1, dtype=sources.dtype)
  belongs = sources[..., None] == numbers[None, None]
  values = (weights * nll, weights)
  sums = (jnp.sum(jnp.where(belongs, x[..., None], 0.0), (0, 1)) for x in values)
  return dict(zip(SOURCE_SUMS, sums))


def batch_sums(
  nll: Values, batch: dict[str, Ids | Values], text_size: int, num_sources: int
) -> dict[str, Scalar | BySource]:
  """Computes the `modality_sums` of a batch and, if `num_sources` > 0, its `source_sums`."""
  weights = batch["loss_weights"]
  sums = modality_sums(nll, batch["targets"], weights, text_size)
  if num_sources:
    sums |= source_sums(nll, weights, batch["sources"], num_sources)
  return sums


def source_losses(names: Sequence[str], sums: Mapping) -> dict[str, float]:
  """Computes the mean loss of each source in nats per target, on the host.

  A source without targets is left out: names ("count", "draw"), source_nll [3 0] and
  source_weight [2 0] give {"loss/count": 1.5}.
  """
  if not names:
    return {}
  pairs = zip(names, *(np.asarray(sums[name], np.float64) for name in SOURCE_SUMS), strict=True)
  return {f"loss/{name}": float(nll / weight) for name, nll, weight in pairs if weight > 0}
