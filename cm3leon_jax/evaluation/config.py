"""Config section for measurements on held-out documents."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT


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
