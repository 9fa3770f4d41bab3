"""Implements contrastive decoding (CD-K; CM3Leon, section 3.1)."""

# B rows, V vocabulary (all ids, or only image codes).

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm3leon_jax.decoding.sampling.top_p import largest


def contrastive_scores(
  expert: Float[Array, "B V"],
  amateur: Float[Array, "B V"],
  k: int,
  alpha: float | Float[Array, ""] | Float[Array, "B 1"],
) -> Float[Array, "B V"]:
  """Scores tokens by CD-K (CM3Leon, section 3.1).

  The score is log p_EXP - log p_AMA where p_EXP is at least alpha times the k-th largest p_EXP.

    p_EXP = [.5 .3 .15 .05], p_AMA = [.5 .1 .3 .1], alpha = 0.4
    k = 2, p_EXP >= 0.12: log [1 3 .5 0]
    k = 1, p_EXP >= 0.2:  log [1 3 0 0], contrastive decoding (Li et al. 2022)

  Args:
    expert: logits; -inf for illegal ids.
    amateur: logits divided by the amateur temperature; -inf for illegal ids.
    k: rank of the reference token. If fewer than k ids are legal, all legal ids are kept.
    alpha: a number in [0, 1].

  Returns:
    Scores; -inf for ids that are illegal or too improbable.
  """
  kth = largest(expert, min(k, expert.shape[-1]))[0][:, -1:]
  kept = (expert >= jnp.log(alpha) + kth) & jnp.isfinite(expert) & jnp.isfinite(amateur)
  return jnp.where(
    kept, jax.nn.log_softmax(expert, axis=-1) - jax.nn.log_softmax(amateur, axis=-1), -jnp.inf
  )
