"""Implements top-k and top-p (nucleus) sampling. Texts are always sampled with this method."""

# B rows, V vocabulary (all ids, or only image codes), C candidates that top-k keeps.

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, Key


def sample_top_p(
  logits: Float[Array, "B V"],
  keys: Key[Array, " B"],
  top_k: Int[Array, " B"],
  top_p: Float[Array, " B"],
  candidates: int,
) -> Int[Array, " B"]:
  """Samples one id for each row (nucleus sampling: Holtzman et al. 2020).

  `keys` has one key per row, so the sample of a row does not depend on other rows. `logits` are
  divided by the temperature; for the other arguments, see `filter_candidates`.
  """
  values, ids = filter_candidates(logits, top_k, top_p, candidates)
  noisy = values + _noise(keys, ids)
  # If rounding makes several noisy logits equal, take the smallest id.
  best = noisy == jnp.max(noisy, axis=-1, keepdims=True)
  return jnp.min(jnp.where(best, ids, logits.shape[-1]), axis=-1)


def filter_candidates(
  logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"], candidates: int
) -> tuple[Float[Array, "B C"], Int32[Array, "B C"]]:
  """Filters by top-k, then by top-p among the remaining candidates.

    top_k = 3, top_p = 0.6, probabilities [.1 .4 .2 .3]: top-k keeps ids [1 3 2] with [.44 .33 .22];
    the sum before id 2 is .44 + .33 >= 0.6, so id 2 is removed.

  Args:
    logits: logits after temperature; ids with -inf are never kept.
    top_k: number of candidates that each row keeps; 0 keeps all C.
    top_p: nucleus in (0, 1]. A candidate is kept if the more probable candidates together have less
      than this probability. So the first candidate is always kept.
    candidates: C, at least the largest element of `top_k`. 0 means V: the whole vocabulary is then
      sorted.

  Returns:
    (logits in descending order, with -inf after the last kept candidate of a row; their ids).
  """
  size = logits.shape[-1]
  values, ids = largest(logits, min(candidates, size) if candidates else size)
  top_k, top_p = top_k[:, None], top_p[:, None]
  values = jnp.where((jnp.arange(values.shape[-1])[None] < top_k) | (top_k == 0), values, -jnp.inf)
  probabilities = jax.nn.softmax(values, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  # With top_p = 1, keep all candidates: rounding can make the sum 1 before the last candidate.
  return jnp.where((before < top_p) | (top_p >= 1), values, -jnp.inf), ids


def largest(x: Float[Array, "B V"], k: int) -> tuple[Float[Array, "B k"], Int32[Array, "B k"]]:
  """Finds the k largest elements of each row on the row's device.

  Without `shard_map`, XLA:TPU would gather all rows first.
  """
  sharding, top_k = jax.typeof(x).sharding, functools.partial(jax.lax.top_k, k=k)
  if not sharding.mesh.empty:
    whole_rows = jax.P(sharding.spec[0], None)
    top_k = jax.shard_map(top_k, in_specs=whole_rows, out_specs=whole_rows)
  values, ids = top_k(x)
  return values, ids


def _noise(keys: Key[Array, " B"], ids: Int[Array, "B C"]) -> Float32[Array, "B C"]:
  """Draws Gumbel noise for each id of each row. The noise does not depend on the order of ids.

  Rounding may swap two nearly equal candidates. If the noise depended on the order, this would also
  swap the sampled tokens.
  """

  def of_id(key: Key[Array, ""], i: Int[Array, ""]) -> Float32[Array, ""]:
    return jax.random.gumbel(jax.random.fold_in(key, i), dtype=jnp.float32)

  return jax.vmap(jax.vmap(of_id, (None, 0)))(keys, ids)
