"""Runs Hugging Face CLIP models in JAX, with the same embeddings as transformers' `CLIPModel`."""

# B batch, L length, D width of a layer, F width of the feed-forward part, N heads, K layers,
# E width of embeddings, H height, W width, S side of the images in pixels,
# h height and w width of the grid of patches.

from collections.abc import Callable, Mapping, Sequence
import copy
import functools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int32
import numpy as np

from cm3leon_jax.clip.checkpoint import (
  ACTIVATIONS,
  OLD_EOS_ID,
  EncoderSizes,
  HFCLIPConfig,
  preprocess,
  read_config,
  read_processing,
  read_tensors,
  stack_layers,
)
from cm3leon_jax.clip.model import normalize
from cm3leon_jax.errors import UserError

DTYPES = ("float32", "bfloat16")
ROWS_PER_DEVICE = 64


def _norm(x: Float[Array, "*B D"], params: dict, name: str, epsilon: float) -> Float[Array, "*B D"]:
  """Applies a layer norm, computed in fp32. The result has the dtype of `x`."""
  y = jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=epsilon)
  axes = range(x.ndim - 1)
  scale, bias = (jnp.expand_dims(params[f"{name}.{k}"], axes) for k in ("weight", "bias"))
  return (y * scale + bias).astype(x.dtype)


def _linear(x: Float[Array, "B L I"], params: dict, name: str) -> Float[Array, "B L O"]:
  return jnp.einsum("BLI,OI->BLO", x, params[f"{name}.weight"]) + params[f"{name}.bias"][None, None]


def run_layers(
  x: Float[Array, "B L D"], layers: dict, encoder: EncoderSizes, causal: bool
) -> Float[Array, "B L D"]:
  """Applies K transformer layers, whose parameters are stacked along their first axis."""
  B, L, D = x.shape
  heads = (B, L, encoder.heads, D // encoder.heads)

  def layer(x: Float[Array, "B L D"], params: dict) -> tuple[Float[Array, "B L D"], None]:
    y = _norm(x, params, "layer_norm1", encoder.epsilon)
    qkv = (_linear(y, params, f"self_attn.{name}_proj").reshape(heads) for name in "qkv")
    # The softmax of `dot_product_attention` is computed in fp32.
    y = jax.nn.dot_product_attention(*qkv, is_causal=causal).reshape(B, L, D)
    x = x + _linear(y, params, "self_attn.out_proj")
    y = _linear(_norm(x, params, "layer_norm2", encoder.epsilon), params, "mlp.fc1")
    return x + _linear(ACTIVATIONS[encoder.activation](y), params, "mlp.fc2"), None

  return jax.lax.scan(layer, x, layers)[0]


def _project(x: Float[Array, "B D"], weight: Float[Array, "E D"]) -> Float32[Array, "B E"]:
  """Projects features to embeddings of norm 1."""
  return normalize(jnp.einsum("BD,ED->BE", x, weight, preferred_element_type=jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def embed_tokens(
  config: HFCLIPConfig, params: dict, tokens: Int32[Array, "B L"]
) -> Float32[Array, "B E"]:
  """Returns embeddings of norm 1 for captions that have start and end tokens.

  Tokens after the end token are ignored.
  """
  with jax.default_matmul_precision("highest"):
    positions = params["text_model.embeddings.position_embedding.weight"][None, : tokens.shape[1]]
    x = params["text_model.embeddings.token_embedding.weight"][tokens] + positions
    x = run_layers(x, params["text_model.layers"], config.text, causal=True)
    end = jnp.argmax(tokens if config.eos_id == OLD_EOS_ID else tokens == config.eos_id, 1)
    x = jnp.take_along_axis(x, end[:, None, None], 1)[:, 0]
    x = _norm(x, params, "text_model.final_layer_norm", config.text.epsilon)
    return _project(x, params["text_projection.weight"])


@functools.partial(jax.jit, static_argnums=0)
def embed_pixels(
  config: HFCLIPConfig, params: dict, pixels: Float32[Array, "B 3 S S"]
) -> Float32[Array, "B E"]:
  """Returns embeddings of norm 1 for preprocessed images."""
  with jax.default_matmul_precision("highest"):
    kernel = params["vision_model.embeddings.patch_embedding.weight"]
    B, side, size = len(pixels), config.resolution // config.patch, config.patch
    x = pixels[:, :, : side * size, : side * size].astype(kernel.dtype)
    x = x.reshape(B, 3, side, size, side, size)
    x = jnp.einsum("BChpwq,DCpq->BhwD", x, kernel).reshape(B, side**2, -1)
    first = params["vision_model.embeddings.class_embedding"]
    x = jnp.concatenate([jnp.broadcast_to(first, (B, 1, config.image.width)), x], 1)
    x = x + params["vision_model.embeddings.position_embedding.weight"][None]
    x = _norm(x, params, "vision_model.pre_layrnorm", config.image.epsilon)
    x = run_layers(x, params["vision_model.layers"], config.image, causal=False)[:, 0]
    x = _norm(x, params, "vision_model.post_layernorm", config.image.epsilon)
    return _project(x, params["visual_projection.weight"])


class HFCLIP:
  """A Hugging Face CLIP model with the methods of `model.CLIP`.

  The parameters are replicated on all devices, and each device embeds its share of a batch. All
  batches have the same shape.
  """

  resolution = None  # Images may have any size: preprocessing scales and crops them.

  def __init__(
    self,
    config: HFCLIPConfig,
    params: dict,
    tokenizer: Any,
    processor: Callable[..., Mapping[str, Any]],
    devices: Sequence[jax.Device] | None = None,
  ):
    """Copies `params` (see `stack_layers`) to `devices`, by default to all devices of this host.

    `tokenizer` and `processor` are results of `read_processing`.
    """
    devices = list(devices or jax.local_devices())
    self.mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    self.config, self.tokenizer, self.processor = config, tokenizer, processor
    self.batch_size = ROWS_PER_DEVICE * len(devices)
    self.params = jax.device_put(params, NamedSharding(self.mesh, P()))

  @classmethod
  def load(
    cls,
    folder: epath.PathLike,
    dtype: str = "bfloat16",
    devices: Sequence[jax.Device] | None = None,
  ) -> "HFCLIP":
    """Reads a checkpoint. The model computes in `dtype` (see `DTYPES`).

    Raises:
      UserError: a file of the checkpoint is absent or wrong.
    """
    if dtype not in DTYPES:
      raise ValueError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}.")
    config = read_config(folder)
    tokenizer, processor = read_processing(folder, config)
    params = stack_layers(read_tensors(folder, config), config, jnp.dtype(dtype))
    return cls(config, params, tokenizer, processor, devices)

  def in_batches(self, size: int) -> "HFCLIP":
    """Returns this model with a batch size of at most `size` rows.

    The number of rows is rounded up to a multiple of the number of devices.
    """
    found, devices = copy.copy(self), self.mesh.size
    found.batch_size = min(-(-size // devices) * devices, self.batch_size)
    return found

  def encode(self, caption: str) -> Int32[np.ndarray, " L"]:
    """Encodes a caption as ids, without start and end token."""
    encoding = self.tokenizer(caption, add_special_tokens=False, verbose=False)
    return np.array(encoding["input_ids"], np.int32)

  def pad_texts(self, texts: Sequence[Int[np.ndarray, " _"]]) -> Int32[np.ndarray, "B L"]:
    """Returns rows of start token, ids of a caption (truncated to fit), end token and padding."""
    start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
    pad = self.tokenizer.pad_token_id
    tokens = np.full((len(texts), self.config.text_length), end if pad is None else pad, np.int32)
    for row, ids in zip(tokens, texts):
      framed = [start, *ids[: self.config.text_length - 2], end]
      row[: len(framed)] = framed
    return tokens

  def embed_texts(self, texts: Sequence[Int[np.ndarray, " _"]]) -> Float32[np.ndarray, "B E"]:
    """Returns embeddings of norm 1 for captions. Each caption is given as the ids from `encode`."""
    return self._batched(embed_tokens, self.pad_texts(texts), lambda rows: rows)

  def embed_images(self, images: np.ndarray) -> Float32[np.ndarray, "B E"]:
    """Returns embeddings of norm 1 for images of any size.

    Raises:
      UserError: the images are not uint8 [B, H, W, 3].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise UserError(
        f"images for CLIP are {images.dtype}{list(images.shape)}; they must be uint8[B, H, W, 3]."
      )
    return self._batched(embed_pixels, images, functools.partial(preprocess, self.processor))

  def _batched(
    self, embed: Callable[..., Array], rows: np.ndarray, prepare: Callable[[np.ndarray], np.ndarray]
  ) -> np.ndarray:
    """Embeds `prepare(rows)` in batches of one shape. The last batch is padded with zeros."""
    size, sharding = self.batch_size, NamedSharding(self.mesh, P("data"))
    out = np.zeros((len(rows), self.config.embed_dim), np.float32)
    for start in range(0, len(rows), size):
      batch = prepare(rows[start : start + size])
      padded = np.pad(batch, ((0, size - len(batch)),) + ((0, 0),) * (batch.ndim - 1))
      with jax.set_mesh(self.mesh):  # The caller's mesh may have other axes.
        result = embed(self.config, self.params, jax.device_put(padded, sharding))
      out[start : start + len(batch)] = np.asarray(result)[: len(batch)]
    return out
