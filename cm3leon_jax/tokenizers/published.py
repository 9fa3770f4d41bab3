"""Defines published image tokenizers: a convolutional VQGAN with traits.

The families are aMUSEd / open-MUSE f16 (Patil et al. 2024, arXiv 2401.01808), Chameleon's
(Chameleon Team 2024, arXiv 2405.09818), and LlamaGen's VQ-16 (Sun et al. 2024, arXiv 2406.06525),
which is also that of Janus (Wu et al. 2024, arXiv 2410.13848). Modules and parameters have the
names of the state dict of taming (Esser et al. 2021, arXiv 2012.09841).
"""

# B batch, H height, W width, C channels, Z latent channels, E code width, K codes,
# h = H / downsample, w = W / downsample.

import dataclasses
import functools
import itertools
from typing import Annotated, TypeAlias

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8
import numpy as np
from pydantic import Field, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT
from cm3leon_jax.config.tokenizers import Family
from cm3leon_jax.models import nnx_params

SECTION = "published"  # Section of config.json that has the fields of PublishedConfig.
Images: TypeAlias = UInt8[Array | np.ndarray, "B H W 3"]
Codes: TypeAlias = Int32[Array | np.ndarray, "B h w"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class PublishedConfig:
  """Sizes and variant of a published tokenizer."""

  family: Family
  """Key of `FAMILIES`."""
  resolution: PositiveInt
  """Side length of the images in pixels; a multiple of `downsample`."""
  widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)]
  """Number of channels of each level, from the highest resolution to the lowest."""
  latent_channels: PositiveInt
  """Number of channels of the encoder's output, Z."""
  code_dim: PositiveInt
  """Width of a code's vector, E."""
  blocks: Annotated[int, Field(gt=0, le=4_096)] = 2
  """Number of residual blocks of each level of the encoder; the decoder has one more."""
  groups: PositiveInt = 32
  """Number of groups of channels that are normalized separately; it divides all widths."""
  level_attention: bool = False
  """Whether attention follows each residual block of the lowest level."""
  middle_attention: bool = False
  """Whether there is attention between the two residual blocks at the lowest resolution."""
  lowest_pixel: Annotated[int, Field(ge=-1, le=0)] = -1
  """Value of black: 0 for pixels in [0, 1], -1 for pixels in [-1, 1]."""

  def __post_init__(self) -> None:
    if wrong := [width for width in self.widths if width % self.groups]:
      raise ValueError(
        f"groups is {self.groups}; it must divide all widths, but one of them is {wrong[0]}."
      )
    if self.resolution % self.downsample:
      raise ValueError(
        f"resolution is {self.resolution}; it must be a multiple of {self.downsample} for "
        f"{len(self.widths)} widths."
      )

  @property
  def downsample(self) -> int:
    return 2 ** (len(self.widths) - 1)

  @property
  def image_tokens(self) -> int:
    return (self.resolution // self.downsample) ** 2

  @property
  def batch_size(self) -> int:
    """Number of images per batch. Some layers take 32 MiB of memory per image of 256x256 pixels."""
    return max(1, 2**20 // self.resolution**2)


FAMILIES: dict[Family, PublishedConfig] = {
  "amused": PublishedConfig(
    family="amused",
    resolution=256,
    widths=(128, 256, 256, 512, 768),
    latent_channels=64,
    code_dim=64,
    lowest_pixel=0,
  ),
  "chameleon": PublishedConfig(
    family="chameleon",
    resolution=512,
    widths=(128, 128, 256, 256, 512),
    latent_channels=256,
    code_dim=256,
    middle_attention=True,
  ),
}
FAMILIES["llamagen"] = dataclasses.replace(
  FAMILIES["chameleon"], family="llamagen", resolution=256, code_dim=8, level_attention=True
)
FAMILIES["janus"] = dataclasses.replace(FAMILIES["llamagen"], family="janus", resolution=384)


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs) -> nnx.Conv:
  """Creates a square convolution that keeps the resolution."""
  return nnx.Conv(inputs, outputs, (size, size), rngs=rngs)


def norm(width: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
  """Creates a layer that normalizes each group of channels over [H, W]."""
  # Flax's fast variance, a difference of squares, is inaccurate for channels with a large mean.
  return nnx.GroupNorm(width, num_groups=groups, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class PublishedResidualBlock(nnx.Module):
  """Residual block of two convolutions. If the width changes, a third convolution adapts x."""

  def __init__(self, inputs: int, outputs: int, groups: int, rngs: nnx.Rngs):
    self.norm1, self.conv1 = norm(inputs, groups, rngs), conv(inputs, outputs, 3, rngs)
    self.norm2, self.conv2 = norm(outputs, groups, rngs), conv(outputs, outputs, 3, rngs)
    self.nin_shortcut = None if inputs == outputs else conv(inputs, outputs, 1, rngs)

  def __call__(self, x: Float[Array, "B H W _"]) -> Float[Array, "B H W _"]:
    h = self.conv1(nnx.silu(self.norm1(x)))
    h = self.conv2(nnx.silu(self.norm2(h)))
    return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nnx.Module):
  """Attention with one head over all positions of an image, and a residual connection."""

  def __init__(self, width: int, groups: int, rngs: nnx.Rngs):
    self.norm = norm(width, groups, rngs)
    self.q, self.k, self.v = (conv(width, width, 1, rngs) for _ in range(3))
    self.proj_out = conv(width, width, 1, rngs)

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    B, H, W, C = x.shape
    y = self.norm(x)
    qkv = (layer(y).reshape(B, H * W, 1, C) for layer in (self.q, self.k, self.v))
    return x + self.proj_out(jax.nn.dot_product_attention(*qkv).reshape(x.shape))


class Downsample(nnx.Module):
  """Halves the resolution with a convolution that pads one pixel on the right and at the bottom."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.conv = nnx.Conv(width, width, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)), rngs=rngs)

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ C"]:
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles the resolution: repeats pixels, then applies a convolution."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.conv = conv(width, width, 3, rngs)

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    return self.conv(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))


class Level(nnx.Module):
  """Residual blocks of one resolution, optionally each followed by attention."""

  def __init__(
    self, inputs: int, outputs: int, blocks: int, attention: bool, groups: int, rngs: nnx.Rngs
  ):
    self.block = nnx.List(
      PublishedResidualBlock(outputs if i else inputs, outputs, groups, rngs) for i in range(blocks)
    )
    self.attn = nnx.List(Attention(outputs, groups, rngs) for _ in range(blocks * attention))

  def __call__(self, x: Float[Array, "B H W _"]) -> Float[Array, "B H W _"]:
    for i, block in enumerate(self.block):
      x = block(x)
      if self.attn:
        x = self.attn[i](x)
    return x


class Middle(nnx.Module):
  """Layers at the lowest resolution, at the end of the encoder and the start of the decoder."""

  def __init__(self, config: PublishedConfig, rngs: nnx.Rngs):
    width, groups = config.widths[-1], config.groups
    self.block_1 = PublishedResidualBlock(width, width, groups, rngs)
    self.attn_1 = Attention(width, groups, rngs) if config.middle_attention else None
    self.block_2 = PublishedResidualBlock(width, width, groups, rngs)

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    x = self.block_1(x)
    return self.block_2(x if self.attn_1 is None else self.attn_1(x))


class PublishedEncoder(nnx.Module):
  """Encodes pixels: [B, H, W, 3] -> [B, h, w, Z]."""

  def __init__(self, config: PublishedConfig, rngs: nnx.Rngs):
    widths, last = config.widths, len(config.widths) - 1
    self.conv_in = conv(3, widths[0], 3, rngs)
    self.down = nnx.List(
      Level(a, b, config.blocks, config.level_attention and i == last, config.groups, rngs)
      for i, (a, b) in enumerate(itertools.pairwise((widths[0], *widths)))
    )
    for level, width in zip(self.down, widths[:-1]):
      level.downsample = Downsample(width, rngs)
    self.mid = Middle(config, rngs)
    self.norm_out = norm(widths[-1], config.groups, rngs)
    self.conv_out = conv(widths[-1], config.latent_channels, 3, rngs)

  def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w _"]:
    x = self.conv_in(x)
    for i, level in enumerate(self.down):
      x = level(x)
      if i < len(self.down) - 1:
        x = level.downsample(x)
    return self.conv_out(nnx.silu(self.norm_out(self.mid(x))))


class PublishedDecoder(nnx.Module):
  """Decodes [B, h, w, Z] to pixels [B, H, W, 3], not clipped."""

  def __init__(self, config: PublishedConfig, rngs: nnx.Rngs):
    widths, last = config.widths, len(config.widths) - 1
    self.conv_in = conv(config.latent_channels, widths[-1], 3, rngs)
    self.mid = Middle(config, rngs)
    self.up = nnx.List(  # Stored in the order of `widths`, but applied in reverse order.
      Level(b, a, config.blocks + 1, config.level_attention and i == last, config.groups, rngs)
      for i, (a, b) in enumerate(itertools.pairwise((*widths, widths[-1])))
    )
    for level, width in zip(self.up[1:], widths[1:]):
      level.upsample = Upsample(width, rngs)
    self.norm_out = norm(widths[0], config.groups, rngs)
    self.conv_out = conv(widths[0], 3, 3, rngs)

  def __call__(self, z: Float[Array, "B h w _"]) -> Float[Array, "B H W 3"]:
    x = self.mid(self.conv_in(z))
    for i in reversed(range(len(self.up))):
      x = self.up[i](x)
      if i:
        x = self.up[i].upsample(x)
    return self.conv_out(nnx.silu(self.norm_out(x)))


class PublishedCodebook(nnx.Module):
  """K codes. The code of an encoding is the nearest vector."""

  def __init__(self, config: PublishedConfig, num_codes: int, rngs: nnx.Rngs):
    self.embedding = nnx.Embed(num_codes, config.code_dim, rngs=rngs)

  @property
  def table(self) -> Float[Array, "K E"]:
    """Vectors of all codes."""
    return self.embedding.embedding[...]

  def scores(self, z: Float[Array, "*B E"]) -> Float[Array, "*B K"]:
    """Returns the scores of all codes for z. The code of z has the largest score."""
    # This is the negative squared distance without the term that is equal for all codes.
    squares = jnp.sum(self.table**2, -1).reshape((1,) * (z.ndim - 1) + (-1,))
    return 2 * jnp.matmul(z, self.table.T) - squares


class PublishedVQGAN(nnx.Module):
  """Encoder, codebook and decoder, with 1 x 1 convolutions before and after the codes."""

  def __init__(self, config: PublishedConfig, num_codes: int, rngs: nnx.Rngs):
    self.encoder, self.decoder = PublishedEncoder(config, rngs), PublishedDecoder(config, rngs)
    self.quantize = PublishedCodebook(config, num_codes, rngs)
    self.quant_conv = conv(config.latent_channels, config.code_dim, 1, rngs)
    self.post_quant_conv = conv(config.code_dim, config.latent_channels, 1, rngs)


@functools.cache
def structure(config: PublishedConfig, num_codes: int) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns graph and abstract state of the module; see `nnx_params.structure`."""
  return nnx_params.structure(lambda: PublishedVQGAN(config, num_codes, nnx.Rngs(params=0)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(
  config: PublishedConfig, num_codes: int, params: dict, images: Images
) -> Int32[Array, "B h w"]:
  """Encodes images to codes. H and W can be any multiples of `config.downsample`."""
  with jax.default_matmul_precision("highest"):
    model, low = nnx_params.fill(*structure(config, num_codes), params), config.lowest_pixel
    z = model.quant_conv(model.encoder(images.astype(jnp.float32) / (255 / (1 - low)) + low))
    return jnp.argmax(model.quantize.scores(z), -1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode_pixels(
  config: PublishedConfig, num_codes: int, params: dict, codes: Codes
) -> Float32[Array, "B H W 3"]:
  """Decodes codes to pixels that are not clipped. Clipped pixels are in [`lowest_pixel`, 1]."""
  with jax.default_matmul_precision("highest"):
    model = nnx_params.fill(*structure(config, num_codes), params)
    return model.decoder(model.post_quant_conv(model.quantize.table[codes]))


def decode(
  config: PublishedConfig, num_codes: int, params: dict, codes: Codes
) -> UInt8[Array, "B H W 3"]:
  """Decodes codes to images."""
  low, pixels = config.lowest_pixel, decode_pixels(config, num_codes, params, codes)
  return jnp.clip(jnp.round((pixels - low) * (255 / (1 - low))), 0, 255).astype(jnp.uint8)
