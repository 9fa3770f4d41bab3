"""Defines CLIP (Radford et al. 2021, arXiv 2103.00020): joint embeddings of images and captions."""

# B batch, L length, D width of a layer, E width of embeddings, H height, W width, C channels,
# h height and w width of the grid of patches.

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
from typing import Protocol, runtime_checkable

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt8
import numpy as np

from cm3leon_jax.config.build import build
from cm3leon_jax.config.tokenizers import HEAD_DIM, CLIPConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.models import nnx_params
from cm3leon_jax.stages import stages
from cm3leon_jax.tokenizers.vqgan import in_batches, to_float
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import stored_tensors

EMBED_BATCH = 128
PARAMS = "params.safetensors"
CONFIG = "config.json"


class TransformerLayer(nnx.Module):
  """Pre-norm transformer layer. Each position attends to all positions that are not padding."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
    self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
    self.out = nnx.Linear(width, width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
    """Applies the layer. `mask` is False at padding."""
    B, L, D = x.shape
    q, k, v = jnp.split(
      self.qkv(self.norm1(x)).reshape(B, L, 3 * D // HEAD_DIM, HEAD_DIM), 3, axis=2
    )
    scores = jnp.einsum("BLND,BMND->BNLM", q, k) * HEAD_DIM**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, -1e9))
    x = x + self.out(jnp.einsum("BNLM,BMND->BLND", weights, v).reshape(B, L, D))
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class ResidualBlock(nnx.Module):
  """Residual block with two 3 x 3 convolutions, each after a norm over channels and a gelu."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
    self.conv1 = nnx.Conv(width, width, (3, 3), rngs=rngs)
    self.conv2 = nnx.Conv(width, width, (3, 3), rngs=rngs)

  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    return x + self.conv2(nnx.gelu(self.norm2(self.conv1(nnx.gelu(self.norm1(x))))))


def patches(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w {size}*{size}*C"]:
  """Cuts images into squares of `size` x `size` pixels, and flattens each square row by row."""
  B, H, W, C = images.shape
  x = images.reshape(B, H // size, size, W // size, size, C)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // size, W // size, size * size * C)


class ConvEncoder(nnx.Module):
  """Residual network over patches. Its outputs are averaged over positions.

  The network has two stages. A stage halves the grid of patches and then applies residual blocks.
  """

  def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
    widths = (config.image_width // 4, config.image_width // 2, config.image_width)
    self.patch = config.patch
    self.embed = nnx.Linear(config.patch**2 * 3, widths[0], rngs=rngs)
    self.norms = nnx.List(nnx.LayerNorm(w, rngs=rngs) for w in widths)
    self.downs = nnx.List(
      nnx.Conv(a, b, (3, 3), strides=(2, 2), rngs=rngs) for a, b in itertools.pairwise(widths)
    )
    self.stages = nnx.List(
      nnx.List(ResidualBlock(w, rngs) for _ in range(config.image_layers)) for w in widths[1:]
    )

  def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
    """Encodes images whose pixels are in [-1, 1]."""
    x = nnx.gelu(self.norms[0](self.embed(patches(images, self.patch))))
    for down, blocks, norm in zip(self.downs, self.stages, self.norms[1:]):
      x = down(x)
      for block in blocks:
        x = block(x)
      x = norm(x)
    return x.mean((1, 2))


class ViTEncoder(nnx.Module):
  """Transformer over patches. Its outputs are averaged over positions."""

  def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
    self.patch = config.patch
    self.embed = nnx.Linear(config.patch**2 * 3, config.image_width, rngs=rngs)
    shape = ((config.resolution // self.patch) ** 2, config.image_width)
    self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
    self.blocks = nnx.List(
      TransformerLayer(config.image_width, rngs) for _ in range(config.image_layers)
    )
    self.norm = nnx.LayerNorm(config.image_width, rngs=rngs)

  def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
    """Encodes images whose pixels are in [-1, 1]."""
    x = self.embed(patches(images, self.patch))
    x = x.reshape(len(x), -1, x.shape[-1]) + self.positions[...][None]
    mask = jnp.ones(x.shape[:2], bool)
    for block in self.blocks:
      x = block(x, mask)
    return self.norm(x).mean(1)


class TextEncoder(nnx.Module):
  """Transformer over the ids of a caption. Its outputs are averaged over the tokens."""

  def __init__(self, config: CLIPConfig, text_size: int, rngs: nnx.Rngs):
    self.embed = nnx.Param(0.5 * jax.random.normal(rngs.params(), (text_size, config.text_width)))
    self.positions = nnx.Param(
      0.1 * jax.random.normal(rngs.params(), (config.text_length, config.text_width))
    )
    self.blocks = nnx.List(
      TransformerLayer(config.text_width, rngs) for _ in range(config.text_layers)
    )
    self.norm = nnx.LayerNorm(config.text_width, rngs=rngs)

  def __call__(self, tokens: Int32[Array, "B L"]) -> Float[Array, "B D"]:
    """Encodes captions, which must be padded with `<pad>` at the end."""
    mask = tokens != VocabLayout.pad
    x = self.embed[...][tokens] + self.positions[...][None, : tokens.shape[1]]
    for block in self.blocks:
      x = block(x, mask)
    return (self.norm(x) * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)


class CLIPModel(nnx.Module):
  """CLIP's image encoder and text encoder, with their projections and the temperature."""

  def __init__(self, config: CLIPConfig, text_size: int, rngs: nnx.Rngs):
    encoder = ViTEncoder if config.image_encoder == "vit" else ConvEncoder
    self.image = encoder(config, rngs)
    self.text = TextEncoder(config, text_size, rngs)
    self.image_projection = nnx.Linear(
      config.image_width, config.embed_dim, use_bias=False, rngs=rngs
    )
    self.text_projection = nnx.Linear(
      config.text_width, config.embed_dim, use_bias=False, rngs=rngs
    )
    self.log_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

  def embed_images(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
    """Returns embeddings of norm 1 for images whose pixels are in [-1, 1]."""
    return normalize(self.image_projection(self.image(images)))

  def embed_texts(self, tokens: Int32[Array, "B L"]) -> Float[Array, "B E"]:
    """Returns embeddings of norm 1 for captions."""
    return normalize(self.text_projection(self.text(tokens)))


@jax.jit
def normalize(x: Float[Array | np.ndarray, "... E"]) -> Float[Array, "... E"]:
  """Scales vectors to norm 1."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.cache
def _structure(config: CLIPConfig, text_size: int) -> tuple[nnx.GraphDef, nnx.State]:
  return nnx_params.structure(lambda: CLIPModel(config, text_size, nnx.Rngs(0)))


def init_params(config: CLIPConfig, text_size: int, key: Key[Array, ""]) -> dict:
  """Initializes fp32 parameters."""
  return nnx_params.to_dict(
    nnx.state(CLIPModel(config, text_size, nnx.Rngs(params=key)), nnx.Param)
  )


def bind(config: CLIPConfig, text_size: int, params: dict) -> CLIPModel:
  """Returns the module with the parameters `params`, which can be called inside `jax.jit`."""
  return nnx_params.fill(*_structure(config, text_size), params)


def pad_texts(texts: Sequence[Int[np.ndarray, " _"]], length: int) -> Int32[np.ndarray, "B L"]:
  """Truncates or pads captions to `length` tokens. Raises UserError if a caption is empty."""
  tokens = np.full((len(texts), length), VocabLayout.pad, np.int32)
  for row, ids in zip(tokens, texts):
    if not len(ids):
      raise UserError("a caption for CLIP has no tokens; it must have at least one.")
    row[: len(ids)] = ids[:length]
  return tokens


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_images(
  config: CLIPConfig, text_size: int, params: dict, images: UInt8[Array, "B H W 3"]
) -> Float32[Array, "B E"]:
  return bind(config, text_size, params).embed_images(to_float(images))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_texts(
  config: CLIPConfig, text_size: int, params: dict, tokens: Int32[Array, "B L"]
) -> Float32[Array, "B E"]:
  return bind(config, text_size, params).embed_texts(tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class CLIP:
  """Trained CLIP. All batches have the same shape, so the batch does not affect an embedding.

  Attributes:
    encode: converts a caption to the int32 ids of CLIP's tokenizer. None if no caller encodes
      captions.
    batch_size: number of rows of a batch. The last batch is padded.
  """

  config: CLIPConfig
  text_size: int
  params: dict
  encode: Callable[[str], np.ndarray] | None = None
  batch_size: int = EMBED_BATCH

  @property
  def resolution(self) -> int:
    """Side of the images, in pixels."""
    return self.config.resolution

  def in_batches(self, size: int) -> "CLIP":
    """Returns this model with a batch size of at most `size`, for callers with few rows."""
    return dataclasses.replace(self, batch_size=min(size, self.batch_size))

  def save(self, folder: epath.PathLike) -> None:
    """Writes params.safetensors and config.json."""
    folder = epath.Path(folder)
    stored_tensors.save(folder / PARAMS, self.params)
    write_json(
      folder / CONFIG, {"clip": dataclasses.asdict(self.config), "text_size": self.text_size}
    )

  @classmethod
  def load(
    cls, folder: epath.PathLike, encode: Callable[[str], np.ndarray] | None = None
  ) -> "CLIP":
    """Loads a CLIP that `save` wrote. Raises UserError if a file is absent or invalid."""
    folder = epath.Path(folder)
    stages.check_files(folder)
    stored = read_json(folder / CONFIG, {"clip": dict, "text_size": int})
    config, text_size = build(CLIPConfig, stored["clip"], "clip"), stored["text_size"]
    expected = nnx_params.to_dict(_structure(config, text_size)[1])
    params = stored_tensors.load(folder / PARAMS, expected, "train_clip")
    return cls(config, text_size, params, encode)

  def embed_images(self, images: np.ndarray) -> Float32[np.ndarray, "B E"]:
    """Returns embeddings of norm 1 for images, uint8 [B, H, W, 3].

    Raises:
      UserError: the images have a wrong shape.
    """
    images, side = np.asarray(images), self.config.resolution
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
      raise UserError(
        f"images for CLIP are {images.dtype}{list(images.shape)}; "
        f"they must be uint8[B, {side}, {side}, 3]."
      )
    return self._batched(_embed_images, images)

  def embed_texts(self, texts: Sequence[Int[np.ndarray, " _"]]) -> Float32[np.ndarray, "B E"]:
    """Returns embeddings of norm 1 for captions, which are given as ids.

    Raises:
      UserError: a caption has no ids.
    """
    return self._batched(_embed_texts, pad_texts(texts, self.config.text_length))

  def _batched(self, embed: Callable[..., Array], rows: np.ndarray) -> np.ndarray:
    embed = functools.partial(embed, self.config, self.text_size, self.params)
    return in_batches(embed, rows, self.batch_size)


@runtime_checkable
class Embedder(Protocol):
  """Interface of `CLIP` and `huggingface.HFCLIP`. All embeddings have norm 1."""

  def embed_images(self, images: np.ndarray) -> Float32[np.ndarray, "B E"]:
    """Embeds images, uint8 [B, H, W, 3]."""

  def embed_texts(self, texts: Sequence[Int[np.ndarray, " _"]]) -> Float32[np.ndarray, "B E"]:
    """Embeds captions, which are given as ids."""


def clip_score(
  clip: Embedder, images: UInt8[np.ndarray, "B H W 3"], texts: Sequence[Int[np.ndarray, " _"]]
) -> Float32[np.ndarray, " B"]:
  """Computes the cosine similarity of each image and its caption.

  The images must have the size that `clip` requires. `texts` has one caption per image, as ids from
  `clip.encode`.
  """
  if len(images) != len(texts):
    raise ValueError(
      f"{len(images)} images and {len(texts)} captions; there must be one caption per image."
    )
  return (clip.embed_images(images) * clip.embed_texts(texts)).sum(-1)
