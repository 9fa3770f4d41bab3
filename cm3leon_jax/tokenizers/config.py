"""Config sections of the text tokenizer, and of the image tokenizer and its training."""

from collections.abc import Iterator
import functools
import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

SMALLEST_PERCEPTUAL = 16  # Pixels, since the network of `perceptual` halves an image four times.
LEVELS = range(3, 9)  # Numbers of levels that a channel of FSQ may have.
Quantizer = Literal["", "fsq"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class TextTokenizerConfig:
  """How the text tokenizer is trained, and how documents use it."""

  min_frequency: PositiveInt = 2
  """Number of times that a merge must occur in the training texts."""
  model_max_length: PositiveInt = 4_096
  """Length that is written for other software; texts are not cut to it."""
  max_caption_tokens: PositiveInt = 512
  """Longest caption in tokens: longer captions lose their end when documents are written. Texts
  without an image are never cut there."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class VQGANConfig:
  """Sizes of the image tokenizer and its training.

  The network halves the resolution from `resolution / stem` to `resolution / downsample`, one
  level for each; level i has `width * multipliers[i]` channels, `encoder_blocks[i]` residual blocks
  on the way down and `decoder_blocks[i]` on the way up. The defaults turn 256x256 pixels into 32x32
  codes, as CM3Leon does (section 2.1). It trains on one host; a published tokenizer
  (`cm3leon import_vqgan`) needs no training.
  """

  resolution: PositiveInt = 256
  """Side of the images in pixels; a multiple of `downsample`."""
  downsample: PositiveInt = 8
  """Side in pixels of the square that one code stands for; `stem` times a power of two."""
  stem: PositiveInt = 2
  """Side of the squares of pixels that become channels before the first convolution, and pixels
  again after the last."""
  width: PositiveInt = 128
  """Number of channels, before `multipliers`."""
  multipliers: tuple[PositiveInt, ...] = (1, 2, 4)
  """Factors of `width`, one per level."""
  encoder_blocks: tuple[NonNegativeInt, ...] = (2, 2, 2)
  """Numbers of residual blocks of the encoder, one per level."""
  decoder_blocks: tuple[NonNegativeInt, ...] = (3, 3, 3)
  """Numbers of residual blocks of the decoder, one per level."""
  local_codes: bool = False
  """Whether a code depends on its own square of pixels alone: the encoder's convolutions are 1 x 1,
  and values are normalized over the channels of a place instead of over the image. Needs `stem` =
  `downsample`. A drawing then has the same codes wherever it stands, in any company."""
  code_dim: PositiveInt = 32
  """Width of a code; of `fsq` the number of channels, each with its levels."""
  quantizer: Quantizer = ""
  """How encodings become codes. Empty: the nearest entry of a learned codebook. `fsq`: each of
  `code_dim` channels is rounded to one of a few levels, without a codebook. Both have
  straight-through gradients."""
  steps: PositiveInt = 500_000
  """Number of training steps, over which the learning rate follows one cosine to 0."""
  batch_size: PositiveInt = 256
  """Images per step."""
  learning_rate: PositiveFloat = 2e-4
  """Learning rate at the end of the warm-up."""
  warmup_steps: NonNegativeInt = 1_000
  """Number of steps of linear warm-up."""
  l1_weight: NonNegativeFloat = 0.5
  """Weight of the absolute error of pixels in [-1, 1]."""
  l2_weight: NonNegativeFloat = 1.0
  """Weight of the squared error of pixels in [-1, 1]."""
  multiscale_weight: NonNegativeFloat = 0.0
  """Weight of the absolute error of the means of squares of 2, 4 and 8 pixels; no measure of what
  people perceive, but with `gradient_weight` the part of it that needs no trained network."""
  gradient_weight: NonNegativeFloat = 0.0
  """Weight of the absolute error of differences between neighboring pixels, so that edges stay
  sharp."""
  perceptual: str = ""
  """File of a VGG16, safetensors with torchvision's names (`features.0.weight`), also with the
  layers of LPIPS (`lin0.model.1.weight`), which then measures the distance of images. None comes
  with this project."""
  perceptual_weight: NonNegativeFloat = 0.0
  """Weight of the distance of images by the network of `perceptual`."""
  codebook_weight: NonNegativeFloat = 1.0
  """Weight of the loss that pulls codes to encodings (van den Oord et al. 2017)."""
  commitment_weight: NonNegativeFloat = 0.25
  """Weight of the loss that pulls encodings to codes (van den Oord et al. 2017)."""
  adversarial_weight: NonNegativeFloat = 0.1
  """Weight of the hinge loss against a patch discriminator; 0: no discriminator."""
  adversarial_adaptive: bool = False
  """Whether the weight is multiplied by how many times the reconstruction's gradient of the last
  layer is larger than the discriminator's (Esser et al. 2021, equation 7); the weight there is
  0.8 or 1."""
  adversarial_start: Annotated[float, Field(ge=0, le=1)] = 0.1
  """Share of the steps after which the discriminator starts."""
  discriminator_width: PositiveInt = 64
  """Number of channels of the discriminator's first layer."""
  discriminator_layers: Annotated[int, Field(gt=0, le=16)] = 3
  """Number of the discriminator's layers with stride 2; 2^layers is at most `resolution`."""
  restart_every: NonNegativeInt = 100
  """Number of steps within which a code must be used, else it restarts at an encoding; 0: never.
  Codes of `fsq` never restart."""
  restart_until: Annotated[float, Field(ge=0, le=1)] = 0.75
  """Share of the steps after which no code restarts, so that the decoder settles."""
  ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Largest decay of the exponential moving average of the parameters, which is then the trained
  tokenizer, e.g. 0.999; 0: none. As `optimizer.ema_decay`."""
  checkpoint_every: PositiveInt = 2_000
  """Number of steps between two states that a killed run continues from."""

  def __post_init__(self) -> None:
    if self.downsample % self.stem or not math.log2(self.downsample // self.stem).is_integer():
      raise ValueError(
        f"downsample is {self.downsample}; it must be stem = {self.stem} times a power of two."
      )
    if self.local_codes and self.stem != self.downsample:
      raise ValueError(
        f"local_codes is set, and stem is {self.stem}; it must be downsample = {self.downsample}."
      )
    if self.resolution % self.downsample:
      raise ValueError(
        f"resolution is {self.resolution}; it must be a multiple of downsample = {self.downsample}."
      )
    for name in ("multipliers", "encoder_blocks", "decoder_blocks"):
      if len(values := getattr(self, name)) != self.num_levels:
        raise ValueError(
          f"{name} is {values}; it must hold {self.num_levels} integers, one per halving from "
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
        "both must be given, a file and a positive weight, or neither."
      )
    if self.perceptual and self.resolution < SMALLEST_PERCEPTUAL:
      raise ValueError(
        f"perceptual is given, and resolution is {self.resolution}; "
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
  """Yields the descending factors in `LEVELS`, none above `largest`, of a number."""
  if number in LEVELS and number <= largest:
    yield (number,)
  for first in range(min(largest, number // LEVELS[0]), LEVELS[0] - 1, -1):
    if number % first == 0:
      yield from ((first, *rest) for rest in _factorizations(number // first, first))


def _products(largest: int) -> set[int]:
  """Returns all products of `LEVELS` up to the largest."""
  found, new = set[int](), {1}
  while new:
    new = {n * level for n in new for level in LEVELS if n * level <= largest} - found
    found |= new
  return found


def check_levels(num_codes: int, code_dim: int) -> None:
  """Raises ValueError if FSQ has no levels for K codes, or another number of them than E."""
  if not levels_of(num_codes):
    near = sorted(_products(2 * num_codes + 8), key=lambda n: abs(n - num_codes))[:2]
    shown = " or ".join(f"{n} = {' x '.join(map(str, levels_of(n)))}" for n in sorted(near))
    raise ValueError(
      f"vqgan.quantizer is fsq, and vocab.image_size is {num_codes}; it must be a product of "
      f"levels from {LEVELS[0]} to {LEVELS[-1]}, e.g. {shown}."
    )
  if code_dim != len(levels := levels_of(num_codes)):
    raise ValueError(
      f"vqgan.code_dim is {code_dim}; for vqgan.quantizer = fsq it must be {len(levels)}: "
      f"{num_codes} codes are {' x '.join(map(str, levels))} levels."
    )
