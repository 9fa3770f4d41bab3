"""Defines the image tokenizer, a convolutional VQGAN (Esser et al. 2021, arXiv 2012.09841).

The module `quantizers` converts encodings to codes. NNX modules define the network. JAX transforms
act on a pure dict of the parameters.
"""

# B batch, H height, W width, C channels, E code width, K codes, h = H / downsample,
# w = W / downsample, T = h * w codes of an image.

from collections.abc import Callable
import dataclasses
import functools
import itertools
from typing import TypeAlias

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key, UInt8
import numpy as np

from cm3leon_jax.config.build import build
from cm3leon_jax.config.tokenizers import VQGANConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.models import nnx_params
from cm3leon_jax.stages import stages
from cm3leon_jax.tokenizers import published, quantizers
from cm3leon_jax.weights import stored_tensors

PARAMS = "params.safetensors"
CONFIG = "config.json"
Config: TypeAlias = VQGANConfig | published.PublishedConfig
Pixels: TypeAlias = Float[Array | np.ndarray, "B H W 3"]
Channels: TypeAlias = Float[Array | np.ndarray, "B H W C"]
Encodings: TypeAlias = Float[Array, "B h w E"]
Indices: TypeAlias = Int32[Array, "B h w"]


def space_to_depth(
  x: Channels, factor: int
) -> Float[Array | np.ndarray, "B H//{factor} W//{factor} C*{factor}**2"]:
  """Folds squares of `factor` x `factor` pixels into channels.

  factor = 2: [[0 1 2 3] [4 5 6 7]] -> [[[0 1 4 5] [2 3 6 7]]]
  """
  b, h, w, c = x.shape
  x = x.reshape(b, h // factor, factor, w // factor, factor, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor * factor * c)


def depth_to_space(
  x: Channels, factor: int
) -> Float[Array | np.ndarray, "B H*{factor} W*{factor} C//{factor}**2"]:
  """Inverts `space_to_depth`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, factor, factor, c // factor**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def normalize(x: Channels, local: bool = False) -> Float[Array, "B H W C"]:
  """Normalizes each image, or each position if `local`, to mean 0 and variance 1."""
  axes = 3 if local else (1, 2, 3)
  x = x - x.mean(axes, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + 1e-5)


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
  """Creates a square convolution that divides the resolution by `stride`."""
  return nnx.Conv(inputs, outputs, (size, size), strides=(stride, stride), rngs=rngs)


class ConvBlock(nnx.Module):
  """Residual block of two convolutions. For `local`, see `normalize`."""

  def __init__(self, width: int, size: int, local: bool, rngs: nnx.Rngs):
    self.conv1, self.conv2 = conv(width, width, size, rngs), conv(width, width, size, rngs)
    self.local = local

  def __call__(self, x: Float[Array | np.ndarray, "B H W D"]) -> Float[Array, "B H W D"]:
    h = self.conv1(nnx.silu(normalize(x, self.local)))
    return x + self.conv2(nnx.silu(normalize(h, self.local)))


class Encoder(nnx.Module):
  """Encodes pixels in [-1, 1]: [B, H, W, 3] -> [B, h, w, E]."""

  def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
    self.stem, self.local = config.stem, config.local_codes
    size = 1 if self.local else 3
    widths = [config.width * m for m in config.multipliers]
    self.conv_in = conv(3 * config.stem**2, widths[0], size, rngs)
    self.levels = nnx.List(
      nnx.List(ConvBlock(w, size, self.local, rngs) for _ in range(n))
      for w, n in zip(widths, config.encoder_blocks)
    )
    self.downs = nnx.List(conv(a, b, 4, rngs, stride=2) for a, b in itertools.pairwise(widths))
    self.conv_out = conv(widths[-1], config.code_dim, 1, rngs)

  def __call__(self, x: Pixels) -> Float[Array, "B h w E"]:
    x = self.conv_in(space_to_depth(x, self.stem))
    for i, blocks in enumerate(self.levels):
      if i:
        x = self.downs[i - 1](nnx.silu(x))
      for block in blocks:
        x = block(x)
    return self.conv_out(normalize(x, self.local))


class Decoder(nnx.Module):
  """Decodes [B, h, w, E] to pixels [B, H, W, 3], not clipped to [-1, 1]."""

  def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
    self.stem, self.local = config.stem, config.local_codes
    widths = [config.width * m for m in config.multipliers][::-1]
    self.conv_in = conv(config.code_dim, widths[0], 3, rngs)
    blocks = config.decoder_blocks[::-1]
    self.levels = nnx.List(
      nnx.List(ConvBlock(w, 3, self.local, rngs) for _ in range(n)) for w, n in zip(widths, blocks)
    )
    self.ups = nnx.List(conv(a, 4 * b, 3, rngs) for a, b in itertools.pairwise(widths))
    self.conv_out = conv(widths[-1], 3 * config.stem**2, 3, rngs)

  def __call__(self, z: Float[Array | np.ndarray, "B h w E"]) -> Float[Array, "B H W 3"]:
    return self.last(self.hidden(z))

  def hidden(self, z: Float[Array | np.ndarray, "B h w E"]) -> Float[Array, "B _ _ D"]:
    """Computes the input of the last layer: [B, H / stem, W / stem, width]."""
    x = self.conv_in(z)
    for i, blocks in enumerate(self.levels):
      if i:
        x = depth_to_space(self.ups[i - 1](nnx.silu(x)), 2)
      for block in blocks:
        x = block(x)
    return nnx.silu(normalize(x, self.local))

  def last(self, hidden: Float[Array | np.ndarray, "B _ _ D"]) -> Float[Array, "B H W 3"]:
    """Applies the last layer to the result of `hidden`."""
    return depth_to_space(self.conv_out(hidden), self.stem)


class VQGAN(nnx.Module):
  """Encoder, codebook and decoder."""

  def __init__(self, config: VQGANConfig, num_codes: int, rngs: nnx.Rngs):
    self.encoder = Encoder(config, rngs)
    self.codebook = quantizers.make(config.quantizer, num_codes, config.code_dim, rngs)
    self.decoder = Decoder(config, rngs)

  def __call__(self, x: Pixels) -> tuple[Float[Array, "B H W 3"], Encodings, Encodings, Indices]:
    """Reconstructs pixels. The encodings get the gradient of the codes (straight-through).

    `x` is [B, H, W, 3] in [-1, 1]. Returns the reconstruction [B, H, W, 3]; the prepared encodings
    z and their codes q, both [B, h, w, E]; and the indices of the codes, int32 [B, h, w].
    """
    hidden, *codes = self.hidden(x)
    return self.decoder.last(hidden), *codes

  def hidden(self, x: Pixels) -> tuple[Float[Array, "B _ _ D"], Encodings, Encodings, Indices]:
    """Returns the results of `__call__`, but `Decoder.hidden` instead of the reconstruction."""
    z = self.codebook.prepare(self.encoder(x))
    indices = self.codebook.nearest(jax.lax.stop_gradient(z))
    q = self.codebook(indices)
    return self.decoder.hidden(quantizers.straight_through(z, q)), z, q, indices


def init_params(config: VQGANConfig, num_codes: int, key: Key[Array, ""]) -> dict:
  """Initializes fp32 parameters as a pure dict."""
  return nnx_params.random(_structure(config, num_codes)[1], key)


@functools.cache
def _structure(config: VQGANConfig, num_codes: int) -> tuple[nnx.GraphDef, nnx.State]:
  return nnx_params.structure(lambda: VQGAN(config, num_codes, nnx.Rngs(params=0)))


def bind(config: VQGANConfig, num_codes: int, params: dict) -> VQGAN:
  """Returns the module with `params`. The call is cheap and works inside jitted functions."""
  return nnx_params.fill(*_structure(config, num_codes), params)


def to_float(images: UInt8[Array | np.ndarray, "*B"]) -> Float32[Array | np.ndarray, "*B"]:
  """Converts uint8 pixels to fp32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(pixels: Float[Array | np.ndarray, "*B"]) -> UInt8[Array, "*B"]:
  """Converts pixels in [-1, 1] to uint8, rounded and clipped."""
  return jnp.clip(jnp.round((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(
  config: Config, num_codes: int, params: dict, images: UInt8[Array | np.ndarray, "B H W 3"]
) -> Int32[Array, "B T"]:
  """Encodes images to codes in raster order."""
  if isinstance(config, published.PublishedConfig):
    return published.encode(config, num_codes, params, images).reshape(images.shape[0], -1)
  model = bind(config, num_codes, params)
  z = model.codebook.prepare(model.encoder(to_float(images)))
  return model.codebook.nearest(z).reshape(images.shape[0], -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode(
  config: Config, num_codes: int, params: dict, codes: Int32[Array | np.ndarray, "B T"]
) -> UInt8[Array, "B H W 3"]:
  """Decodes codes in raster order to images."""
  side = config.resolution // config.downsample
  codes = codes.reshape(-1, side, side)
  if isinstance(config, published.PublishedConfig):
    return published.decode(config, num_codes, params, codes)
  model = bind(config, num_codes, params)
  return to_uint8(model.decoder(model.codebook(codes)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def code_vectors(config: VQGANConfig, num_codes: int, params: dict) -> Float32[Array, "K E"]:
  """Returns the vectors of all codes as the decoder receives them."""
  return bind(config, num_codes, params).codebook(jnp.arange(num_codes))


def in_batches(function: Callable[[np.ndarray], Array], array: np.ndarray, size: int) -> np.ndarray:
  """Applies a jitted function in batches of `size`. Pads the last batch, to compile only once."""
  outputs = []
  for start in range(0, max(len(array), 1), size):
    batch = np.asarray(array[start : start + size])
    padding = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
    outputs.append(np.asarray(function(np.concatenate([batch, padding])))[: len(batch)])
  return np.concatenate(outputs)


def is_published(folder: epath.PathLike) -> bool:
  """Returns whether a folder contains a published tokenizer, not one that was trained here."""
  path = epath.Path(folder) / CONFIG
  return path.exists() and published.SECTION in read_json(path, {})


@dataclasses.dataclass(frozen=True)
class ImageTokenizer:
  """A trained or published VQGAN that converts images to codes and back.

  It has `num_codes` (K) codes and processes `batch_size` images at a time.
  """

  config: Config
  num_codes: int
  params: dict
  batch_size: int = 64

  @classmethod
  def load(cls, folder: epath.PathLike) -> "ImageTokenizer":
    """Reads the files of `save`. Raises UserError if a file is absent, damaged or inconsistent."""
    folder = epath.Path(folder)
    stages.check_files(folder)
    stored = read_json(folder / CONFIG, {"num_codes": int})
    if stored["num_codes"] < 1:
      raise UserError(
        f"{folder / CONFIG}: num_codes is {stored['num_codes']}; it must be greater than 0."
      )
    if published.SECTION in stored:
      section = published.SECTION
      stored = read_json(folder / CONFIG, {section: dict, "num_codes": int})
      other = build(published.PublishedConfig, stored[section], section)
      expected = nnx_params.to_dict(published.structure(other, stored["num_codes"])[1])
      params = stored_tensors.load(folder / PARAMS, expected, "import_vqgan")
      return cls(other, stored["num_codes"], params, other.batch_size)
    stored = read_json(folder / CONFIG, {"vqgan": dict, "num_codes": int})
    config = build(VQGANConfig, stored["vqgan"], "vqgan")
    expected = jax.eval_shape(lambda: init_params(config, stored["num_codes"], jax.random.key(0)))
    params = stored_tensors.load(folder / PARAMS, expected, "train_vqgan")
    return cls(config, stored["num_codes"], params)

  def save(self, folder: epath.PathLike) -> None:
    """Writes params.safetensors and config.json, each atomically."""
    folder = epath.Path(folder)
    section = published.SECTION if isinstance(self.config, published.PublishedConfig) else "vqgan"
    about = {section: dataclasses.asdict(self.config), "num_codes": self.num_codes}
    write_json(folder / CONFIG, about)
    stored_tensors.save(folder / PARAMS, self.params)

  def codebook(self) -> np.ndarray:
    """Returns the vectors of all codes as the decoder receives them, fp32 [K, E]."""
    if isinstance(self.config, published.PublishedConfig):
      return np.asarray(self.params["quantize"]["embedding"]["embedding"])
    return jax.device_get(code_vectors(self.config, self.num_codes, self.params))

  def in_batches(self, size: int) -> "ImageTokenizer":
    """Returns this tokenizer with a batch size of at most `size`, for small inputs."""
    return dataclasses.replace(self, batch_size=min(size, self.batch_size))

  def encode(self, images: np.ndarray) -> np.ndarray:
    """Encodes images, uint8 [B, H, W, 3], to codes, int32 [B, T], in raster order.

    Raises ValueError for another shape or dtype.
    """
    side = self.config.resolution
    if images.shape[1:] != (side, side, 3) or images.dtype != np.uint8:
      raise ValueError(
        f"images are {images.dtype} {images.shape}; they must be uint8 [B, {side}, {side}, 3]."
      )
    return in_batches(
      lambda x: encode(self.config, self.num_codes, self.params, x), images, self.batch_size
    )

  def decode(self, codes: np.ndarray) -> np.ndarray:
    """Decodes codes, int32 [B, T], to images, uint8 [B, H, W, 3].

    Raises ValueError for another shape, or for a code outside [0, K).
    """
    codes = np.asarray(codes, np.int32)
    if codes.ndim != 2 or codes.shape[1] != self.config.image_tokens:
      raise ValueError(
        f"codes have shape {codes.shape}; it must be [B, {self.config.image_tokens}]."
      )
    if codes.size and not (codes.min() >= 0 and codes.max() < self.num_codes):
      raise ValueError(
        f"codes are in [{codes.min()}, {codes.max()}]; they must be in [0, {self.num_codes})."
      )
    return in_batches(
      lambda x: decode(self.config, self.num_codes, self.params, x), codes, self.batch_size
    )
