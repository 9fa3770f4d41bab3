"""Config section of the measures of held-out documents."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
  """What `cm3leon evaluate` measures on held-out documents, after training."""

  num_documents: Annotated[int, Field(ge=2)] = 200
  """Number of held-out pairs to score, chosen by the seed; all pairs if there are fewer."""
  batch_size: PositiveInt = 8
  """Rows scored at once; a multiple of the parts into which the mesh splits a batch."""
  num_resamples: Annotated[int, Field(ge=100)] = 10_000
  """Number of bootstrap resamples of the concepts, for the intervals."""
  scenes: NonNegativeInt = 0
  """Held-out captions of `raw.source` = "scenes" to generate images for and judge; 0: none."""
  scene_guidance: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (1.0,)
  """Guidance weights at which each of these captions gets an image."""
  scene_neighbors: NonNegativeInt = 0
  """Number of retrieved documents before each of these captions."""
