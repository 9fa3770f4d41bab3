"""Defines the config section `sampling`: how tokens are sampled."""

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

Method = Literal["top_p", "contrastive", "mixture"]
METHODS = get_args(Method)
Schedule = Literal["constant", "linear", "cosine"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class SamplingConfig:
  """Sampling of tokens with the methods of CM3Leon, section 3.1.

  The defaults are from the tutorial that this project started from.
  """

  method: Method = "top_p"
  """Sampler of image codes. `top_p` applies top-k, then nucleus sampling, to guided logits.
  `contrastive` applies CD-K without guidance. `mixture` chooses one of the two for each sample,
  by its seed and with equal probability."""
  temperature: PositiveFloat = 1.0
  """Divisor of the guided logits. For greedy sampling, set `top_k` to 1."""
  top_k: NonNegativeInt = 256
  """Number of most probable candidates to keep before nucleus sampling. 0 keeps all, and 1
  is greedy."""
  top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
  """Nucleus: a candidate is kept if all more probable candidates together have less than this
  probability."""
  guidance: NonNegativeFloat = 3.0
  """Weight alpha of classifier-free guidance: the logits are u + alpha (c - u) for unconditional
  logits u and conditional logits c. 1 uses only c."""
  guidance_schedule: Schedule = "constant"
  """Schedule of guidance over the codes of an image. `linear` and `cosine` grow from 1 at the first
  code to the full weight at the last."""
  image_guidance: NonNegativeFloat = 1.5
  """Guidance weight of the input image in image editing (section 4.1)."""
  edit_guidance: NonNegativeFloat = 7.5
  """Guidance weight of the instruction in image editing."""
  contrastive_k: PositiveInt = 16
  """CD-K keeps tokens that are at least `contrastive_alpha` times as probable as the k-th most
  probable token. k = 1 is contrastive decoding (Li et al. 2022), which is nearly greedy. The
  paper does not give k and alpha; the default of k is this project's choice."""
  contrastive_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
  """Alpha of CD-K; see `contrastive_k`. The defaults of alpha and of the two temperatures are from
  CM3Leon's released script."""
  contrastive_temperature: PositiveFloat = 0.8
  """Divisor of the scores of CD-K."""
  amateur_temperature: PositiveFloat = 0.5
  """Divisor of the logits of CD-K's amateur, which is the unconditional stream."""
  text_temperature: PositiveFloat = 1.0
  """Temperature for text tokens, which CD-K never samples."""
  text_top_k: NonNegativeInt = 256
  """`top_k` for text tokens."""
  text_top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
  """`top_p` for text tokens."""
