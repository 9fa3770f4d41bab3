"""From logits to tokens: top-k, nucleus, contrastive decoding (CD-K), and draws that belong to one row each."""

# B rows, V vocabulary (or the rows of it that are legal), C candidates left by top-k.

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT
from cm3leon_jax.decoding.guidance import Schedule

Method = Literal["top_p", "contrastive", "mixture"]
METHODS = get_args(Method)


class SamplingValues(NamedTuple):
  """The numbers of a SamplingConfig that are traced: another value does not recompile. fp32 or int32 scalars."""

  temperature: np.ndarray
  top_k: np.ndarray
  top_p: np.ndarray
  text_temperature: np.ndarray
  text_top_k: np.ndarray
  text_top_p: np.ndarray
  contrastive_temperature: np.ndarray
  contrastive_alpha: np.ndarray
  amateur_temperature: np.ndarray


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class SamplingConfig:
  """How tokens are sampled: the samplers of CM3Leon, section 3.1. Defaults are the tutorial's."""

  method: Method = "top_p"
  """Sampler of image tokens. `top_p`: top-k, then nucleus, on guided logits. `contrastive`: CD-K,
  without guidance. `mixture`: half of the samples with each."""
  temperature: PositiveFloat = 1.0
  """Divisor of the guided logits; for greedy sampling set `top_k` to 1."""
  top_k: NonNegativeInt = 256
  """Number of candidates kept before the nucleus; 0 keeps all, 1 is greedy."""
  top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
  """Nucleus: a candidate is kept if the candidates above it hold less than this probability."""
  guidance: float = 3.0
  """Weight alpha of classifier-free guidance, u + alpha (c - u); 1 is the conditional model
  alone."""
  guidance_schedule: Schedule = "constant"
  """Growth of guidance over the codes of an image, from 1 to its weight."""
  image_guidance: float = 1.5
  """Weight of the given image where an image is edited (section 4.1)."""
  edit_guidance: float = 7.5
  """Weight of the instruction where an image is edited."""
  contrastive_k: PositiveInt = 16
  """CD-K keeps tokens at least `contrastive_alpha` times as probable as the k-th; 1 is
  contrastive decoding (Li et al. 2022), nearly greedy. The paper gives no values of k and alpha:
  this k is ours."""
  contrastive_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
  """Alpha of `contrastive_k`; this number and the two temperatures are the released script's."""
  contrastive_temperature: PositiveFloat = 0.8
  """Divisor of CD-K's scores."""
  amateur_temperature: PositiveFloat = 0.5
  """Divisor of the logits of the amateur, the unconditional stream."""
  text_temperature: PositiveFloat = 1.0
  """`temperature` of text tokens, which are never sampled by CD-K."""
  text_top_k: NonNegativeInt = 256
  """`top_k` of text tokens."""
  text_top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
  """`top_p` of text tokens."""

  @property
  def values(self) -> SamplingValues:
    """What `select` takes."""
    dtype = lambda field: np.int32 if "top_k" in field else np.float32
    return SamplingValues(
      *(np.asarray(getattr(self, field), dtype(field)) for field in SamplingValues._fields)
    )

  def candidates(self, *, image: bool, text: bool) -> int:
    """C of draws of image tokens, text tokens or both in one batch: the largest top_k among them, 0 if one keeps all."""
    drawn = [
      top_k for top_k, is_drawn in ((self.top_k, image), (self.text_top_k, text)) if is_drawn
    ]
    return 0 if 0 in drawn else max(drawn)


class RowSettings(NamedTuple):
  """How each row is drawn.

  Attributes:
    temperature: [B] fp32; of a contrastive row, of its scores.
    top_k: [B] int32; 0 keeps all. Not read in a contrastive row, nor is top_p.
    top_p: [B] fp32.
    contrastive: [B] bool, rows drawn by CD-K.
    contrastive_alpha: [B] fp32.
    amateur_temperature: [B] fp32.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  contrastive: jax.Array
  contrastive_alpha: jax.Array
  amateur_temperature: jax.Array


def contrastive_rows(method: str, seeds: Sequence[int], samples: int) -> np.ndarray:
  """Which samples of which prompts are drawn by CD-K.

    "mixture", seeds 4 and 7, 3 samples of each: [[0 1 0] [0 1 0]]; one of each, by the seed alone: [[0] [1]]

  Returns:
    [prompts, samples] bool.
  """
  if method == "mixture":
    one = np.arange(samples)[None] if samples > 1 else np.asarray(seeds)[:, None]
    return np.broadcast_to(one % 2 == 1, (len(seeds), samples))
  return np.full((len(seeds), samples), method == "contrastive")


def select(is_image, contrastive, values: SamplingValues) -> RowSettings:
  """Settings of rows that are to draw an image token or a text token.

  Args:
    is_image: [B] bool.
    contrastive: [B] bool, rows whose image tokens are drawn by CD-K.
    values: `SamplingConfig.values`.
  """
  contrastive = contrastive & is_image
  every = lambda value: jnp.full_like(is_image, value, jnp.float32)
  temperature = jnp.where(is_image, values.temperature, values.text_temperature)
  return RowSettings(
    temperature=jnp.where(contrastive, values.contrastive_temperature, temperature),
    top_k=jnp.where(is_image, values.top_k, values.text_top_k),
    top_p=jnp.where(is_image, values.top_p, values.text_top_p),
    contrastive=contrastive,
    contrastive_alpha=every(values.contrastive_alpha),
    amateur_temperature=every(values.amateur_temperature),
  )


def filter_candidates(logits, top_k, top_p, candidates: int):
  """Top-k, then top-p among what is left.

    top_k = 3, top_p = 0.6, probabilities [.1 .4 .2 .3]: top-k leaves ids [1 3 2] with [.44 .33 .22];
    id 2 has .44 + .33 >= 0.6 above it and goes.

  Args:
    logits: [B, V] fp32, temperature applied; -inf is never kept.
    top_k: [B] int32, candidates that each row keeps; 0 keeps all C.
    top_p: [B] fp32, nucleus in (0, 1]: keeps a candidate if the probability *before* it is less, so the first always stays.
    candidates: C, no less than any top_k; 0 stands for V, and only then is the whole vocabulary sorted.

  Returns:
    (logits [B, C] in falling order, -inf where a row's candidates end; ids [B, C] int32).
  """
  size = logits.shape[-1]
  values, ids = jax.lax.top_k(logits, min(candidates, size) if candidates else size)
  top_k, top_p = top_k[:, None], top_p[:, None]
  values = jnp.where((jnp.arange(values.shape[-1])[None] < top_k) | (top_k == 0), values, -jnp.inf)
  probabilities = jax.nn.softmax(values, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  # Rounding can bring the sum to 1 before the last candidate.
  return jnp.where((before < top_p) | (top_p >= 1), values, -jnp.inf), ids


def contrastive_scores(expert, amateur, k: int, alpha):
  """Scores of CD-K (CM3Leon, section 3.1): log p_EXP - log p_AMA where p_EXP >= alpha times the k-th largest p_EXP.

    p_EXP = [.5 .3 .15 .05], p_AMA = [.5 .1 .3 .1], alpha = 0.4
    k = 2, p_EXP >= 0.12: log [1 3 .5 0]
    k = 1, p_EXP >= 0.2:  log [1 3 0 0], contrastive decoding (Li et al. 2022)

  Args:
    expert: [B, V] fp32 logits; illegal ids are -inf.
    amateur: [B, V] fp32 logits, temperature applied; likewise.
    k: with fewer than k legal ids all of them stay.
    alpha: in [0, 1], a scalar or [B, 1].

  Returns:
    [B, V] fp32, -inf for ids that are illegal or too improbable.
  """
  kth = jax.lax.top_k(expert, min(k, expert.shape[-1]))[0][:, -1:]
  kept = (expert >= jnp.log(alpha) + kth) & jnp.isfinite(expert) & jnp.isfinite(amateur)
  return jnp.where(
    kept, jax.nn.log_softmax(expert, axis=-1) - jax.nn.log_softmax(amateur, axis=-1), -jnp.inf
  )


def sample(
  guided,
  keys,
  rows: RowSettings,
  candidates: int,
  expert=None,
  amateur=None,
  contrastive_k: int = 1,
):
  """Draws one id a row.

  Args:
    guided: [B, V] fp32 logits, not split over V; illegal ids are -inf, and each row has a legal one.
    keys: [B] PRNG keys, one a row: a row's draw does not depend on the other rows.
    rows: how each row is drawn.
    candidates: as in `filter_candidates`, static.
    expert: [B, V] fp32 logits of the conditional stream alone, likewise; None: there are no contrastive rows.
    amateur: [B, V] fp32 logits of the unconditional stream; likewise.
    contrastive_k: k of CD-K, static.

  Returns:
    ([B] int32 ids, [B] fp32 log-probability of each under softmax(guided): before temperature and filters, CD-K or not).
  """
  temperature = rows.temperature[:, None]
  draw, pick = jax.vmap(jax.random.categorical), jax.vmap(lambda row, i: row[i])
  values, ids = filter_candidates(guided / temperature, rows.top_k, rows.top_p, candidates)
  token = pick(ids, draw(keys, values))
  if expert is not None:
    amateur = amateur / rows.amateur_temperature[:, None]
    scores = contrastive_scores(expert, amateur, contrastive_k, rows.contrastive_alpha[:, None])
    token = jnp.where(rows.contrastive, draw(keys, scores / temperature), token)
  return token, pick(jax.nn.log_softmax(guided, axis=-1), token)
