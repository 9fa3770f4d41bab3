"""From logits to tokens: guidance, top-k, nucleus, contrastive decoding (CD-K), sampling."""

# B rows, S guidance streams, I tokens of an image, V vocabulary (or the part of it that is legal),
# C candidates that top-k keeps, P prompts, N samples of a prompt.

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key
import numpy as np

from cm3leon_jax.decoding.config import SCHEDULES, SamplingConfig


class SamplingValues(NamedTuple):
  """Numbers of a SamplingConfig that are traced: other values do not compile again.

  They are those of all rows, or arrays with one number for each row.
  """

  temperature: Float32[np.ndarray, " *B"]
  top_k: Int32[np.ndarray, " *B"]
  top_p: Float32[np.ndarray, " *B"]
  text_temperature: Float32[np.ndarray, " *B"]
  text_top_k: Int32[np.ndarray, " *B"]
  text_top_p: Float32[np.ndarray, " *B"]
  contrastive_temperature: Float32[np.ndarray, " *B"]
  contrastive_alpha: Float32[np.ndarray, " *B"]
  amateur_temperature: Float32[np.ndarray, " *B"]

  @classmethod
  def of(cls, config: SamplingConfig) -> "SamplingValues":
    """Returns the traced numbers of a config."""
    return cls(
      *(
        np.asarray(getattr(config, field), np.int32 if "top_k" in field else np.float32)
        for field in cls._fields
      )
    )


class Sampler(NamedTuple):
  """Fields of a `SamplingConfig` that are compiled into the program.

  Attributes:
    of_codes: candidates where only image codes are sampled, as in `filter_candidates`.
    of_all: candidates where texts are sampled, too.
    contrastive_k: k of CD-K; 0: no row uses it.
  """

  of_codes: int
  of_all: int
  contrastive_k: int

  @classmethod
  def of(cls, config: SamplingConfig) -> "Sampler":
    """Returns the compiled settings of a config."""
    k = 0 if config.method == "top_p" else config.contrastive_k
    return cls(
      config.candidates(image=True, text=False), config.candidates(image=True, text=True), k
    )


class RowSettings(NamedTuple):
  """Settings by which each row samples its token.

  Attributes:
    temperature: divides the logits; in a contrastive row it divides the scores of CD-K.
    top_k: 0 keeps all. A contrastive row uses neither top_k nor top_p.
    top_p: nucleus.
    contrastive: rows that use CD-K.
    contrastive_alpha: alpha of CD-K.
    amateur_temperature: divides the amateur's logits.
  """

  temperature: Float32[Array, " B"]
  top_k: Int32[Array, " B"]
  top_p: Float32[Array, " B"]
  contrastive: Bool[Array, " B"]
  contrastive_alpha: Float32[Array, " B"]
  amateur_temperature: Float32[Array, " B"]


def contrastive_rows(method: str, seeds: Sequence[int], samples: int) -> Bool[np.ndarray, "P N"]:
  """Selects the samples of each prompt that use CD-K.

  "mixture", seeds 4 and 7, 3 samples of each: [[0 1 0] [0 1 0]]
  "mixture", seeds 4 and 7, 1 sample of each, chosen by the seed: [[0] [1]]
  """
  if method == "mixture":
    one = np.arange(samples)[None] if samples > 1 else np.asarray(seeds)[:, None]
    return np.broadcast_to(one % 2 == 1, (len(seeds), samples))
  return np.full((len(seeds), samples), method == "contrastive")


def select(
  is_image: Bool[Array, " B"], contrastive: Bool[Array, " B"], values: SamplingValues
) -> RowSettings:
  """Selects the settings of rows that sample an image token or a text token next.

  Args:
    is_image: whether a row samples an image token.
    contrastive: rows whose image tokens are sampled by CD-K.
    values: numbers of the rows.
  """
  contrastive = contrastive & is_image
  temperature = jnp.where(is_image, values.temperature, values.text_temperature)
  return RowSettings(
    temperature=jnp.where(contrastive, values.contrastive_temperature, temperature),
    top_k=jnp.where(is_image, values.top_k, values.text_top_k),
    top_p=jnp.where(is_image, values.top_p, values.text_top_p),
    contrastive=contrastive,
    contrastive_alpha=jnp.full_like(is_image, values.contrastive_alpha, jnp.float32),
    amateur_temperature=jnp.full_like(is_image, values.amateur_temperature, jnp.float32),
  )


def filter_candidates(
  logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"], candidates: int
) -> tuple[Float[Array, "B C"], Int32[Array, "B C"]]:
  """Filters by top-k, then by top-p among the remaining candidates.

    top_k = 3, top_p = 0.6, probabilities [.1 .4 .2 .3]: top-k keeps ids [1 3 2] with [.44 .33 .22];
    id 2 has .44 + .33 >= 0.6 before it and is removed.

  Args:
    logits: temperature applied; -inf is never kept.
    top_k: candidates that each row keeps; 0 keeps all C.
    top_p: nucleus in (0, 1]: keeps a candidate if the probability *before* it is less, so the
      first always stays.
    candidates: C, no less than any top_k; 0 stands for V, and only then is the whole vocabulary
      sorted.

  Returns:
    (logits in falling order, -inf after the last candidate of a row; their ids).
  """
  size = logits.shape[-1]
  values, ids = _top_k(logits, min(candidates, size) if candidates else size)
  top_k, top_p = top_k[:, None], top_p[:, None]
  values = jnp.where((jnp.arange(values.shape[-1])[None] < top_k) | (top_k == 0), values, -jnp.inf)
  probabilities = jax.nn.softmax(values, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  # Rounding can bring the sum to 1 before the last candidate.
  return jnp.where((before < top_p) | (top_p >= 1), values, -jnp.inf), ids


def _top_k(x: Float[Array, "B V"], k: int) -> tuple[Float[Array, "B k"], Int32[Array, "B k"]]:
  """Finds the k largest of each row where the row is: XLA:TPU would gather all rows first."""
  sharding, largest = jax.typeof(x).sharding, functools.partial(jax.lax.top_k, k=k)
  if not sharding.mesh.empty:
    whole_rows = jax.P(sharding.spec[0], None)
    largest = jax.shard_map(largest, in_specs=whole_rows, out_specs=whole_rows)
  values, ids = largest(x)
  return values, ids


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
    expert: logits; illegal ids are -inf.
    amateur: logits, temperature applied; illegal ids are -inf.
    k: with fewer than k legal ids all of them stay.
    alpha: in [0, 1].

  Returns:
    Scores, -inf for ids that are illegal or too improbable.
  """
  kth = _top_k(expert, min(k, expert.shape[-1]))[0][:, -1:]
  kept = (expert >= jnp.log(alpha) + kth) & jnp.isfinite(expert) & jnp.isfinite(amateur)
  return jnp.where(
    kept, jax.nn.log_softmax(expert, axis=-1) - jax.nn.log_softmax(amateur, axis=-1), -jnp.inf
  )


def _noise(keys: Key[Array, " B"], ids: Int[Array, "B C"]) -> Float32[Array, "B C"]:
  """Draws Gumbel noise for each id of each row: the same for an id at any place in `ids`.

  Rounding may swap the places of candidates that are nearly equal; noise of places would then swap
  the tokens, too.
  """

  def of_id(key, i):
    return jax.random.gumbel(jax.random.fold_in(key, i), dtype=jnp.float32)

  return jax.vmap(jax.vmap(of_id, (None, 0)))(keys, ids)


def sample(
  guided: Float[Array, "B V"],
  keys: Key[Array, " B"],
  rows: RowSettings,
  candidates: int,
  expert: Float[Array, "B V"] | None = None,
  amateur: Float[Array, "B V"] | None = None,
  contrastive_k: int = 1,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """Samples one id for each row.

  Args:
    guided: logits, not split over V; illegal ids are -inf, and each row has a legal id.
    keys: of the rows: the sample of a row does not depend on the other rows.
    rows: settings of each row.
    candidates: as in `filter_candidates`, static.
    expert: logits of the conditional stream alone, illegal ids -inf; None: no row uses CD-K.
    amateur: logits of the unconditional stream, illegal ids -inf.
    contrastive_k: k of CD-K, static.

  Returns:
    (ids, log-probability of each id under softmax(guided), that is before temperature, filters and
    CD-K).
  """
  temperature = rows.temperature[:, None]
  categorical, pick = jax.vmap(jax.random.categorical), jax.vmap(lambda row, i: row[i])
  values, ids = filter_candidates(guided / temperature, rows.top_k, rows.top_p, candidates)
  noisy = values + _noise(keys, ids)
  # Of sums that rounding makes equal the first id.
  best = noisy == jnp.max(noisy, axis=-1, keepdims=True)
  token = jnp.min(jnp.where(best, ids, guided.shape[-1]), axis=-1)
  if expert is not None:
    amateur = amateur / rows.amateur_temperature[:, None]
    scores = contrastive_scores(expert, amateur, contrastive_k, rows.contrastive_alpha[:, None])
    token = jnp.where(rows.contrastive, categorical(keys, scores / temperature), token)
  return token, pick(jax.nn.log_softmax(guided, axis=-1), token)


def combine_streams(
  logits: Float[Array, "S B V"], weights: Float[Array, "#B S"] | Float[Array, " S"]
) -> Float[Array, "B V"]:
  """Combines logits of S streams by weights: classifier-free guidance (sections 3.1, 4.1).

  `training.step.grpo` combines hidden states in the same way, before the head.

    logits = [[[1 2]] [[0 4]]], weights = [3 -2]: [[3 -2]]

  Args:
    logits: finite: illegal ids are masked in the result, since 0 times -inf is NaN.
    weights: of all prompts, or of each; the weights of a prompt sum to 1.

  Returns:
    Logits. With weights (1, 0) they are those of the first stream, unchanged.
  """
  # Not an einsum: on some devices that rounds its inputs to fewer bits.
  return jnp.sum(logits * jnp.atleast_2d(weights).T[:, :, None], axis=0)


def divergence(
  conditional: Float[Array, "*B V"], unconditional: Float[Array, "*B V"]
) -> Float32[Array, "*B"]:
  """Computes KL(conditional || unconditional) in nats: what guidance has to work with.

  It is 0 where a prompt changes nothing, e.g. one that was dropped on its way.

  Args:
    conditional: finite logits of the stream with the prompt.
    unconditional: finite logits of the stream without it.
  """
  p, q = (jax.nn.log_softmax(x, axis=-1) for x in (conditional, unconditional))
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1).astype(jnp.float32)


def scheduled(guidance: float, schedule: str, image_tokens: int) -> Float[np.ndarray, " I"]:
  """Computes the weight of guidance at each code: 1 + (guidance - 1) m; m is the schedule.

    guidance = 3, "linear", 3 codes: [1 2 3]

  Args:
    guidance: the full weight; 1 is the model without guidance.
    schedule: "constant": m is 1. "linear" and "cosine" rise from 0 at the first code to 1 at the
      last, in a straight line or as (1 - cos(pi t)) / 2; the mean of m is 1/2 for both, so the mean
      weight is (1 + guidance) / 2.
    image_tokens: I; with a rising schedule an image of one code is not guided.

  Raises:
    ValueError: another schedule.
  """
  t = np.linspace(0, 1, image_tokens)
  match schedule:
    case "constant":
      m = np.ones_like(t)
    case "linear":
      m = t
    case "cosine":
      m = (1 - np.cos(np.pi * t)) / 2
    case _:
      raise ValueError(f"schedule is '{schedule}'; it must be one of {', '.join(SCHEDULES)}.")
  return 1 + (guidance - 1) * m


def text_to_image_weights(
  guidance: float, schedule: str, image_tokens: int
) -> Float32[np.ndarray, "I 2"]:
  """Returns the weights (alpha, 1 - alpha) of streams c (conditional) and u in u + alpha (c - u).

    guidance = 3, "linear", 3 codes: [[1 0] [2 -1] [3 -2]]

  Args:
    guidance: alpha where the schedule is 1.
    schedule: as in `scheduled`.
    image_tokens: I.
  """
  alpha = scheduled(guidance, schedule, image_tokens)
  return np.stack([alpha, 1 - alpha], axis=1).astype(np.float32)


def editing_weights(
  image_guidance: float, text_guidance: float, schedule: str, image_tokens: int
) -> Float32[np.ndarray, "I 3"]:
  """Returns the weights of streams f (image and instruction), i (image only) and u (neither).

  They sum to u + s_img (i - u) + s_txt (f - i).

    image_guidance = 1.5, text_guidance = 7.5, "linear", 3 codes:
    [[1 0 0] [4.25 -3 -0.25] [7.5 -6 -0.5]]

  Args:
    image_guidance: s_img where the schedule is 1.
    text_guidance: s_txt where the schedule is 1.
    schedule: as in `scheduled`, the same for both; where it is 0, only f counts.
    image_tokens: I.
  """
  image, text = (
    scheduled(guidance, schedule, image_tokens) for guidance in (image_guidance, text_guidance)
  )
  return np.stack([text, image - text, 1 - image], axis=1).astype(np.float32)
