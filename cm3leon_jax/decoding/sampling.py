"""From logits to tokens: guidance over streams, top-k, nucleus, and draws that belong to one prompt each."""

# S guidance streams, B prompts, V vocabulary (or the rows of it that are legal), C candidates left by top-k.

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How a token is drawn; the defaults are the tutorial's.

  Attributes:
    temperature: divides the guided logits; positive.
    top_k: candidates kept before the nucleus; 0 keeps all, 1 is greedy.
    top_p: nucleus; a candidate stays if the candidates above it hold less than this probability.
    guidance: weight alpha of classifier-free guidance, u + alpha (c - u); 1 is the conditional model alone.
  """

  temperature: float = 1.0
  top_k: int = 256
  top_p: float = 0.9
  guidance: float = 3.0

  def __post_init__(self):
    if not self.temperature > 0:
      raise ValueError(f"temperature is {self.temperature}; it must be positive (top_k = 1 is greedy).")
    if self.top_k < 0:
      raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 to keep every token.")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1].")


def combine_streams(logits, weights):
  """Weighs the logits of S guidance streams into one (CM3Leon, section 3.1).

  Args:
    logits: [S, B, V] fp32.
    weights: [S]; they sum to 1. Text-to-image: (alpha, 1 - alpha) for the conditional and the unconditional stream.

  Returns:
    [B, V] fp32. With weights (1, 0) it is the first stream, unchanged.
  """
  # Not an einsum: on some devices that rounds its inputs to fewer bits.
  return jnp.sum(logits * weights[:, None, None], axis=0)


def filter_candidates(logits, top_k: int, top_p):
  """Top-k, then top-p among what is left.

    top_k = 3, top_p = 0.6, probabilities [.1 .4 .2 .3]: top-k leaves ids [1 3 2] with [.44 .33 .22];
    id 2 has .44 + .33 >= 0.6 above it and goes.

  Args:
    logits: [B, V] fp32, temperature applied; -inf is never kept.
    top_k: candidates kept; 0 keeps all.
    top_p: nucleus in (0, 1]: keeps a candidate if the probability *before* it is less, so the first always stays.

  Returns:
    (logits [B, C] in falling order, -inf where the nucleus ends; ids [B, C] int32).
  """
  size = logits.shape[-1]
  values, ids = jax.lax.top_k(logits, min(top_k, size) if top_k else size)
  probabilities = jax.nn.softmax(values, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  # Rounding can bring the sum to 1 before the last candidate.
  return jnp.where((before < top_p) | (top_p >= 1), values, -jnp.inf), ids


def sample(logits, keys, temperature, top_k: int, top_p):
  """Draws one id a row.

  Args:
    logits: [B, V] fp32, not split over V.
    keys: [B] PRNG keys, one a row: a row's draw does not depend on the other rows.
    temperature: as in SamplingConfig.
    top_k: likewise, static.
    top_p: likewise.

  Returns:
    ([B] int32 ids, [B] fp32 log-probability of each under softmax(logits): before temperature and filters).
  """
  values, ids = filter_candidates(logits / temperature, top_k, top_p)
  choice = jax.vmap(jax.random.categorical)(keys, values)
  pick = lambda row, i: row[i]
  token = jax.vmap(pick)(ids, choice)
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return token, jax.vmap(pick)(log_probs, token)
