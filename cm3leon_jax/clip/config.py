"""Defines the config section for CLIP and its training."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

HEAD_DIM = 64  # Width of an attention head.


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class CLIPConfig:
  """Settings of both encoders of CLIP and of their training.

  The defaults are ViT-B/32 and its recipe, but the side of an image is 256 pixels instead of 224.
  CLIP trains on one host. A published CLIP (`retrieval.clip`) needs no training.
  """

  resolution: PositiveInt = 256
  """Side of the images in pixels; a multiple of `patch`."""
  image_encoder: Literal["vit", "conv"] = "vit"
  """Image encoder. `vit` is a vision transformer. `conv` is a residual network with three widths
  (`image_width` / 4, / 2 and / 1), which learns more from few images and in a short time."""
  patch: PositiveInt = 32
  """Side of a patch in pixels."""
  image_width: Annotated[int, Field(gt=0, multiple_of=HEAD_DIM)] = 768
  """Width of the image encoder. For `conv`, it is the width of the last stage."""
  image_layers: PositiveInt = 12
  """Number of transformer layers. For `conv`, number of residual blocks per stage after the first
  stage."""
  text_width: Annotated[int, Field(gt=0, multiple_of=HEAD_DIM)] = 512
  """Width of the text transformer."""
  text_layers: PositiveInt = 12
  """Number of layers of the text transformer."""
  text_length: PositiveInt = 77
  """Longest caption in tokens. Longer captions are truncated."""
  embed_dim: PositiveInt = 512
  """Width E of the embeddings."""
  steps: PositiveInt = 400_000
  """Number of training steps."""
  batch_size: Annotated[int, Field(ge=2)] = 32_768
  """Pairs per step. The other pairs of the batch are the negatives of a pair."""
  learning_rate: PositiveFloat = 5e-4
  """Learning rate at the end of the warm-up. Afterwards it decays to 0 along a cosine."""
  warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.005
  """Share of the steps in which the learning rate rises linearly (warm-up)."""
  weight_decay: NonNegativeFloat = 0.2
  """Weight decay of AdamW. It applies only to matrices."""
  text_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Share of caption tokens that are randomly dropped in training."""
  shift: Annotated[float, Field(ge=0, lt=1)] = 0.1
  """Largest random shift of a training image, as a share of its side."""
  color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """In training, the difference between an image and white is multiplied per channel by a random
  factor from 1 - `color_jitter` to 1 + `color_jitter`."""
  checkpoint_every: PositiveInt = 1_000
  """Number of steps between two checkpoints, from which a killed run continues."""

  def __post_init__(self) -> None:
    if self.resolution % self.patch:
      raise ValueError(f"patch = {self.patch} does not divide resolution = {self.resolution}.")
