"""Defines the config sections of the text tokenizer, the image tokenizer and CLIP."""

from collections.abc import Iterator
import functools
import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT

SMALLEST_PERCEPTUAL = 16  # Pixels. The network of `perceptual` halves the side four times.
LEVELS = range(3, 9)  # Allowed numbers of levels of an FSQ channel.
Quantizer = Literal["", "fsq"]
Family = Literal["amused", "chameleon", "llamagen", "janus"]  # Published networks.
Layers = Annotated[int, Field(ge=0, le=4_096)]  # More, in a stranger's file, would take hours.
Installed = Literal["", "pictures"]  # Trained tokenizers that the package contains.


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class TextTokenizerConfig:
  """Settings of the text tokenizer's training, and of the encoding of captions."""

  min_frequency: PositiveInt = 2
  """Minimum number of times that a pair of tokens must occur in the training texts to be merged."""
  model_max_length: PositiveInt = 4_096
  """Maximum length, stored for other software; this project does not cut texts to it."""
  max_caption_tokens: PositiveInt = 512
  """Maximum number of caption tokens. The end of a longer caption is cut off when documents are
  written. Texts without an image are not cut."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class VQGANConfig:
  """Sizes of the image tokenizer, and settings of its training.

  The encoder halves the resolution from `resolution / stem` to `resolution / downsample`, with one
  level per resolution. Level i has `width * multipliers[i]` channels, `encoder_blocks[i]` residual
  blocks in the encoder and `decoder_blocks[i]` in the decoder. The defaults turn 256x256 pixels
  into 32x32 codes, as in CM3Leon (section 2.1). Training runs on one host. A published tokenizer
  (`cm3leon import_vqgan`) needs no training.
  """

  published: Literal["", Family] = ""
  """Network of a published tokenizer that `cm3leon import_vqgan` imports. Of this section, only
  `resolution` and `downsample` then matter. Empty: the stage `vqgan` trains a tokenizer, unless one
  was imported before."""
  source: Installed = ""
  """Tokenizer of the package that the stage `vqgan` uses instead of training one
  (docs/vqgan.md#pictures). Of this section, only `resolution`, `downsample`, `batch_size` and
  `steps` then matter. Empty: the stage trains a tokenizer."""
  resolution: PositiveInt = 256
  """Side length of the images in pixels; a multiple of `downsample`."""
  downsample: PositiveInt = 8
  """Side length in pixels of the square that one code represents; `stem` times a power of two."""
  stem: PositiveInt = 2
  """Side length in pixels of the squares that are folded into channels before the first
  convolution, and unfolded into pixels after the last."""
  width: PositiveInt = 128
  """Number of channels before multiplication by `multipliers`."""
  multipliers: tuple[PositiveInt, ...] = (1, 2, 4)
  """Factors of `width`, one per level."""
  encoder_blocks: tuple[Layers, ...] = (2, 2, 2)
  """Number of residual blocks of each encoder level."""
  decoder_blocks: tuple[Layers, ...] = (3, 3, 3)
  """Number of residual blocks of each decoder level."""
  local_codes: bool = False
  """Whether a code depends only on its own square of pixels. Convolutions of the encoder are then
  1 x 1, and values are normalized over the channels of each position instead of over the image.
  Needs `stem` = `downsample`. Equal squares then have equal codes in all images."""
  code_dim: PositiveInt = 32
  """Width of a code; for `fsq`, the number of channels."""
  quantizer: Quantizer = ""
  """Method that converts encodings to codes. Empty: the nearest entry of a learned codebook. `fsq`:
  rounds each of `code_dim` channels to one of a few levels, without a codebook. Both have
  straight-through gradients."""
  steps: PositiveInt = 500_000
  """Number of training steps; the learning rate decays to 0 over them, along one cosine."""
  batch_size: PositiveInt = 256
  """Images per step."""
  learning_rate: PositiveFloat = 2e-4
  """Learning rate at the end of warm-up."""
  warmup_steps: NonNegativeInt = 1_000
  """Number of linear warm-up steps."""
  l1_weight: NonNegativeFloat = 0.5
  """Weight of the absolute error of pixels in [-1, 1]."""
  l2_weight: NonNegativeFloat = 1.0
  """Weight of the squared error of pixels in [-1, 1]."""
  multiscale_weight: NonNegativeFloat = 0.0
  """Weight of the absolute error of means over squares with sides of 2, 4 and 8 pixels. Together
  with `gradient_weight`, it replaces a perceptual loss and needs no trained network."""
  gradient_weight: NonNegativeFloat = 0.0
  """Weight of the absolute error of differences between neighboring pixels; keeps edges sharp."""
  perceptual: str = ""
  """Safetensors file of a VGG16 with torchvision's names (`features.0.weight`). If the file also
  has the layers of LPIPS (`lin0.model.1.weight`), they weight the features. This project contains
  no such file."""
  perceptual_weight: NonNegativeFloat = 0.0
  """Weight of the distance between images in features of the network `perceptual`."""
  codebook_weight: NonNegativeFloat = 1.0
  """Weight of the loss that moves codebook entries to encodings (van den Oord et al. 2017)."""
  commitment_weight: NonNegativeFloat = 0.25
  """Weight of the loss that moves encodings to codebook entries (van den Oord et al. 2017)."""
  adversarial_weight: NonNegativeFloat = 0.1
  """Weight of the hinge loss of a patch discriminator. 0 disables the discriminator."""
  adversarial_adaptive: bool = False
  """Whether `adversarial_weight` is multiplied by a ratio of gradient norms at the last layer:
  reconstruction loss over discriminator loss (Esser et al. 2021, equation 7). The
  paper then uses a weight of 0.8 or 1."""
  adversarial_start: Annotated[float, Field(ge=0, le=1)] = 0.1
  """Fraction of the steps after which the discriminator starts."""
  discriminator_width: PositiveInt = 64
  """Number of channels of the discriminator's first layer."""
  discriminator_layers: Annotated[int, Field(gt=0, le=16)] = 3
  """Number of discriminator layers with stride 2; 2^layers is at most `resolution`."""
  restart_every: NonNegativeInt = 100
  """Number of steps after which an unused code is set to the value of an encoding (restarts). 0
  disables restarts; codes of `fsq` never restart."""
  restart_until: Annotated[float, Field(ge=0, le=1)] = 0.75
  """Fraction of the steps after which no code restarts, so that the decoder settles."""
  ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Largest decay of the exponential moving average of the parameters, e.g. 0.999, as in
  `optimizer.ema_decay`. The average becomes the trained tokenizer. 0 disables it."""
  checkpoint_every: PositiveInt = 2_000
  """Number of steps between checkpoints, from which a killed run continues."""

  def __post_init__(self) -> None:
    if self.downsample % self.stem or not math.log2(self.downsample // self.stem).is_integer():
      raise ValueError(
        f"downsample is {self.downsample}; it must be stem = {self.stem} times a power of two."
      )
    if self.local_codes and self.stem != self.downsample:
      raise ValueError(
        f"local_codes is set, but stem is {self.stem}; it must be downsample = {self.downsample}."
      )
    if self.resolution % self.downsample:
      raise ValueError(
        f"resolution is {self.resolution}; it must be a multiple of downsample = {self.downsample}."
      )
    for name in ("multipliers", "encoder_blocks", "decoder_blocks"):
      if len(values := getattr(self, name)) != self.num_levels:
        raise ValueError(
          f"{name} is {values}; it must have {self.num_levels} integers, one per resolution from "
          f"stem = {self.stem} to downsample = {self.downsample}."
        )
    if self.adversarial_weight and 2**self.discriminator_layers > self.resolution:
      raise ValueError(
        f"discriminator_layers is {self.discriminator_layers}; 2^layers must be at most "
        f"resolution = {self.resolution}."
      )
    if bool(self.perceptual) != bool(self.perceptual_weight):
      raise ValueError(
        f"perceptual is '{self.perceptual}' and perceptual_weight {self.perceptual_weight:g}; "
        "give both, a file and a positive weight, or neither."
      )
    if self.perceptual and self.resolution < SMALLEST_PERCEPTUAL:
      raise ValueError(
        f"perceptual is given, but resolution is {self.resolution}; "
        f"it must be at least {SMALLEST_PERCEPTUAL}."
      )

  @property
  def num_levels(self) -> int:
    return int(math.log2(self.downsample // self.stem)) + 1

  @property
  def image_tokens(self) -> int:
    return (self.resolution // self.downsample) ** 2


@functools.cache
def levels_of(num_codes: int) -> tuple[int, ...]:
  """Returns numbers of levels whose product is K: as few as possible, then as equal as possible.

  levels_of(1_024) = (8, 8, 4, 4)
  levels_of(1_000) = (8, 5, 5, 5)
  levels_of(1_021) = (), since 1,021 is a prime number
  """
  found = list(_factorizations(num_codes, LEVELS[-1]))
  return max(found, key=lambda levels: (-len(levels), levels[-1]), default=())


def _factorizations(number: int, largest: int) -> Iterator[tuple[int, ...]]:
  """Yields factorizations of a number: descending factors in `LEVELS`, none above `largest`."""
  if number in LEVELS and number <= largest:
    yield (number,)
  for first in range(min(largest, number // LEVELS[0]), LEVELS[0] - 1, -1):
    if number % first == 0:
      yield from ((first, *rest) for rest in _factorizations(number // first, first))


def check_levels(num_codes: int, code_dim: int) -> None:
  """Raises ValueError if no FSQ levels give K codes, or if they need another E."""
  if not levels_of(num_codes):
    raise ValueError(
      f"vqgan.quantizer is fsq, but vocab.image_size is {num_codes}; it must be a product of "
      f"levels from {LEVELS[0]} to {LEVELS[-1]}."
    )
  if code_dim != len(levels := levels_of(num_codes)):
    raise ValueError(
      f"vqgan.code_dim is {code_dim}; for vqgan.quantizer = fsq it must be {len(levels)}: "
      f"{num_codes} codes are {' x '.join(map(str, levels))} levels."
    )


HEAD_DIM = 64  # Width of an attention head of CLIP.


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
  image_layers: Annotated[Layers, Field(gt=0)] = 12
  """Number of transformer layers. For `conv`, number of residual blocks per stage after the first
  stage."""
  text_width: Annotated[int, Field(gt=0, multiple_of=HEAD_DIM)] = 512
  """Width of the text transformer."""
  text_layers: Annotated[Layers, Field(gt=0)] = 12
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
