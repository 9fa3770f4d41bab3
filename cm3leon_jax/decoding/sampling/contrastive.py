"""Implements contrastive decoding (CD-K; CM3Leon, section 3.1)."""

# B rows, V vocabulary (all ids, or only image codes).

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.sampling.method import StreamLogits, TokenMethod
from cm3leon_jax.decoding.sampling.top_p import largest


class ContrastiveRows(NamedTuple):
  """Settings of CD-K for each row.

  Attributes:
    alpha: smallest allowed ratio of a token's probability to the k-th largest probability.
    amateur_temperature: divisor of the logits of the amateur, which is the unconditional stream.
  """

  alpha: Float32[Array, " B"]
  amateur_temperature: Float32[Array, " B"]


class ContrastiveMethod(TokenMethod):
  """CD-K with the conditional stream as expert and the unconditional stream as amateur."""

  name = "contrastive"
  settings = (
    *("contrastive_k", "contrastive_alpha"),
    *("contrastive_temperature", "amateur_temperature"),
  )
  is_guided = False
  needs_unconditional = True
  numbers = ("contrastive_temperature", "contrastive_alpha", "amateur_temperature")
  temperature = "contrastive_temperature"

  def compiled(self, config: SamplingConfig) -> int:
    """Returns k, for which the program is compiled."""
    return config.contrastive_k

  def rows(self, is_image: Bool[Array, " B"], values: Any) -> ContrastiveRows:
    return ContrastiveRows(
      alpha=jnp.full_like(is_image, values.contrastive_alpha, jnp.float32),
      amateur_temperature=jnp.full_like(is_image, values.amateur_temperature, jnp.float32),
    )

  def sample(
    self,
    logits: StreamLogits,
    keys: Key[Array, " B"],
    temperature: Float[Array, "B 1"],
    rows: ContrastiveRows,
    compiled: int,
  ) -> Int[Array, " B"]:
    amateur = logits.unconditional / rows.amateur_temperature[:, None]
    scores = contrastive_scores(logits.conditional, amateur, compiled, rows.alpha[:, None])
    return jax.vmap(jax.random.categorical)(keys, scores / temperature)


CONTRASTIVE = ContrastiveMethod()


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
