"""Samples the next token of each row of a batch from logits, with settings per row."""

# B rows, V vocabulary (all ids, or only image codes), C candidates that top-k keeps.

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key
import numpy as np

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding.sampling.contrastive import contrastive_scores
from cm3leon_jax.decoding.sampling.top_p import sample_top_p

Number: TypeAlias = jax.Array | np.ndarray


class SamplingValues(NamedTuple):
  """Numbers of a SamplingConfig that are traced, so that new values do not cause recompilation.

  Each field is a scalar for all rows, or an array with one number per row (int32 or fp32).
  """

  temperature: Number
  top_k: Number
  top_p: Number
  text_temperature: Number
  text_top_k: Number
  text_top_p: Number
  contrastive_temperature: Number
  contrastive_alpha: Number
  amateur_temperature: Number

  @classmethod
  def of(cls, config: SamplingConfig) -> "SamplingValues":
    """Returns the traced numbers of a config."""
    values = (getattr(config, field) for field in cls._fields)
    return cls(*(np.asarray(x, np.int32 if isinstance(x, int) else np.float32) for x in values))


class Sampler(NamedTuple):
  """Settings of a `SamplingConfig` that are compiled into the program.

  Attributes:
    of_codes: number of candidates (see `filter_candidates`) if only image codes are sampled.
    of_all: number of candidates if texts may be sampled, too.
    contrastive_k: k of contrastive decoding. 0 if no row may use it, so that it is left out.
  """

  of_codes: int
  of_all: int
  contrastive_k: int = 0

  @classmethod
  def of(cls, config: SamplingConfig, streams: int = 2) -> "Sampler":
    """Returns the compiled settings of a config, for prompts with this number of streams."""
    both = config.top_k, config.text_top_k
    contrastive = config.method != "top_p" and streams > 1
    of_all = 0 if 0 in both else max(both)  # 0 keeps all candidates.
    return cls(config.top_k, of_all, config.contrastive_k if contrastive else 0)


class StreamLogits(NamedTuple):
  """Logits that are not sharded over V. Illegal ids are -inf.

  Attributes:
    guided: logits of all streams, combined with the guidance weights.
    conditional: logits of the stream with the complete prompt.
    unconditional: logits of the stream without the prompt. With one stream, they equal
      `conditional`.
  """

  guided: Float[Array, "B V"]
  conditional: Float[Array, "B V"]
  unconditional: Float[Array, "B V"]


class RowSettings(NamedTuple):
  """Settings with which each row samples its next token.

  Attributes:
    temperature: divisor of the logits, or of the scores of contrastive decoding.
    top_k: number of candidates of top-p; 0 keeps all.
    contrastive: rows that use contrastive decoding.
    alpha: smallest allowed ratio of a token's probability to the k-th largest probability.
    amateur_temperature: divisor of the logits of the amateur, which is the unconditional stream.
  """

  temperature: Float32[Array, " B"]
  top_k: Int32[Array, " B"]
  top_p: Float32[Array, " B"]
  contrastive: Bool[Array, " B"]
  alpha: Float32[Array, " B"]
  amateur_temperature: Float32[Array, " B"]


def select(
  is_image: Bool[Array, " B"], contrastive: Bool[Array, " B"], values: SamplingValues
) -> RowSettings:
  """Selects the settings for the next token of each row.

  `is_image` marks the rows whose next token is an image code. `contrastive` marks the rows that
  sample image codes by contrastive decoding.
  """
  contrastive = contrastive & is_image
  temperature = jnp.where(is_image, values.temperature, values.text_temperature)
  return RowSettings(
    temperature=jnp.where(contrastive, values.contrastive_temperature, temperature),
    top_k=jnp.where(is_image, values.top_k, values.text_top_k),
    top_p=jnp.where(is_image, values.top_p, values.text_top_p),
    contrastive=contrastive,
    alpha=jnp.full_like(is_image, values.contrastive_alpha, jnp.float32),
    amateur_temperature=jnp.full_like(is_image, values.amateur_temperature, jnp.float32),
  )


def sample(
  logits: StreamLogits,
  keys: Key[Array, " B"],
  rows: RowSettings,
  candidates: int,
  contrastive_k: int = 0,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """Samples one id for each row. Each row must have at least one legal id.

  Rows may use different methods. So the program computes the tokens of both, and each row takes the
  token of its method.

  Args:
    keys: one key per row, so the sample of a row does not depend on other rows.
    candidates: see `filter_candidates`; static.
    contrastive_k: as in `Sampler`; static.

  Returns:
    (ids, log-probability of each id under softmax(guided) before temperature and filters).
  """
  temperature = rows.temperature[:, None]
  token = sample_top_p(logits.guided / temperature, keys, rows.top_k, rows.top_p, candidates)
  if contrastive_k:
    amateur = logits.unconditional / rows.amateur_temperature[:, None]
    alpha = rows.alpha[:, None]
    scores = contrastive_scores(logits.conditional, amateur, contrastive_k, alpha)
    other = jax.vmap(jax.random.categorical)(keys, scores / temperature)
    token = jnp.where(rows.contrastive, other, token)
  pick = jax.vmap(lambda row, i: row[i])
  return token, pick(jax.nn.log_softmax(logits.guided, axis=-1), token)
