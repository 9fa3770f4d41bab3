"""The config section `sampling`: how tokens are sampled."""

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

Method = Literal["top_p", "contrastive", "mixture"]
METHODS = get_args(Method)
Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = get_args(Schedule)


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
  guidance: NonNegativeFloat = 3.0
  """Weight alpha of classifier-free guidance, u + alpha (c - u); 1 is the conditional model
  alone."""
  guidance_schedule: Schedule = "constant"
  """Growth of guidance over the codes of an image, from 1 to its weight."""
  image_guidance: NonNegativeFloat = 1.5
  """Weight of the given image where an image is edited (section 4.1)."""
  edit_guidance: NonNegativeFloat = 7.5
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
