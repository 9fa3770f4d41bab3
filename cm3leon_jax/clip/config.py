"""Config section of CLIP and its training."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

HEAD_DIM = 64  # Width of an attention head.


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class CLIPConfig:
  """Both encoders of CLIP and their training.

  The defaults are ViT-B/32 and its recipe, at this project's 256 pixels instead of 224. It trains
  on one host; a published CLIP (`retrieval.clip`) needs no training.
  """

  resolution: PositiveInt = 256
  """Side of the images in pixels; a multiple of `patch`."""
  image_encoder: Literal["vit", "conv"] = "vit"
  """Image encoder: a vision transformer, or a residual network of three widths (`image_width` /
  4, / 2, / 1) that learns more from few images and little time."""
  patch: PositiveInt = 32
  """Side in pixels of the squares that the image encoder reads."""
  image_width: Annotated[int, Field(gt=0, multiple_of=HEAD_DIM)] = 768
  """Width of the image encoder (its last stage)."""
  image_layers: PositiveInt = 12
  """Number of transformer layers, or of residual blocks per stage after the first."""
  text_width: Annotated[int, Field(gt=0, multiple_of=HEAD_DIM)] = 512
  """Width of the text transformer."""
  text_layers: PositiveInt = 12
  """Number of layers of the text transformer."""
  text_length: PositiveInt = 77
  """Longest caption in tokens; longer captions are cut."""
  embed_dim: PositiveInt = 512
  """Width E of the embeddings."""
  steps: PositiveInt = 400_000
  """Number of training steps."""
  batch_size: Annotated[int, Field(ge=2)] = 32_768
  """Pairs per step; the other pairs of the batch are the negatives of a pair."""
  learning_rate: PositiveFloat = 5e-4
  """Learning rate at the end of the warm-up; from there a cosine to 0."""
  warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.005
  """Share of the steps with a linear warm-up."""
  weight_decay: NonNegativeFloat = 0.2
  """AdamW's weight decay, on matrices only."""
  text_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Share of the caption's tokens that training leaves out."""
  shift: Annotated[float, Field(ge=0, lt=1)] = 0.1
  """Largest random shift of a training image, as a share of its side."""
  color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Largest random change of a training image's distance from white, per channel."""
  checkpoint_every: PositiveInt = 1_000
  """Number of steps between two states that a killed run continues from."""

  def __post_init__(self) -> None:
    if self.resolution % self.patch:
      raise ValueError(f"patch = {self.patch} does not divide resolution = {self.resolution}.")
