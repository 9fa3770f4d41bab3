"""Defines the config sections of sampling and of evaluation, and types keyword arguments.

The types of keyword arguments let type checkers find mistakes in calls of `CM3Leon`.
"""

from typing import Annotated, Literal, TypedDict, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT

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


class TextSampling(TypedDict, total=False):
  """Fields of `config.sampling` for texts."""

  text_temperature: float
  text_top_k: int
  text_top_p: float


class TopP(TypedDict, total=False):
  """Fields of `config.sampling` for top-p sampling of image codes."""

  temperature: float
  top_k: int
  top_p: float


class ImageCodes(TopP, total=False):
  """Fields of `config.sampling` for image codes, with any sampling method."""

  method: Method
  contrastive_k: int
  contrastive_alpha: float
  contrastive_temperature: float
  amateur_temperature: float
  guidance_schedule: Schedule


class ImageSampling(ImageCodes, total=False):
  """Fields of `config.sampling` that `generate` and `infill` use."""

  guidance: float


class EditSampling(ImageCodes, total=False):
  """Fields of `config.sampling` that `edit` uses."""

  image_guidance: float
  edit_guidance: float


class DocumentSampling(TopP, TextSampling, total=False):
  """Fields of `config.sampling` that `interleave` uses."""


class GenerateOptions(ImageSampling, total=False):
  """Keyword arguments of `CM3Leon.generate`."""

  num_samples: int
  retrieve: int | None
  seed: int
  rank: bool


class TextOptions(TextSampling, total=False):
  """Keyword arguments of `CM3Leon.caption` and `CM3Leon.answer`."""

  length: int
  retrieve: int
  seed: int


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
  """Settings of `cm3leon evaluate`, which measures a trained model on held-out documents."""

  num_documents: Annotated[int, Field(ge=2)] = 200
  """Number of held-out pairs to score, chosen by the seed. If there are fewer, all are scored."""
  batch_size: PositiveInt = 8
  """Rows in a batch for scoring; a multiple of mesh.data x mesh.fsdp x mesh.fsdp_inner."""
  num_resamples: Annotated[int, Field(ge=100)] = 10_000
  """Number of bootstrap resamples for the confidence intervals. Resamples draw whole concepts."""
  judge: str = ""
  """`FILE.py:FUNCTION`, a function of yours in a file relative to the config: (image, uint8 [H, W,
  3]; facts of the caption) -> "" if the image shows what the facts say, else what is wrong. Only
  --config may name it; a file that a stored run or a bundle names is never imported."""
  captions: NonNegativeInt = 0
  """Number of held-out captions with facts for which images are generated and judged. 0 judges no
  images."""
  guidance: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (1.0,)
  """Guidance weights for the images of `captions`. Each caption gets one image per weight."""
  neighbors: NonNegativeInt = 0
  """Number of retrieved documents before each caption."""
