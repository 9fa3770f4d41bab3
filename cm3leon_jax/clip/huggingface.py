"""Hugging Face CLIP checkpoints, such as ViT-B/32 and ViT-L/14, with the results of CLIPModel."""

# B batch, L length, D width, F feed-forward, N heads, E embedding, H height, W width, h and w of
# the grid of patches, S side of the images in pixels, K layers.

from collections.abc import Sequence
import dataclasses
import functools

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8
import numpy as np
import safetensors
import safetensors.numpy

from cm3leon_jax.clip.model import normalize
from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
DTYPES = ("float32", "bfloat16")
ROWS_PER_DEVICE = 64
# `eos_token_id` in config.json before transformers 4.31; the end is the tokenizer's largest id.
OLD_EOS_ID = 2
ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Sizes of a transformer of pre-norm layers.

  Attributes:
    width: D.
    layers: K.
    heads: N.
    mlp_width: F.
    activation: key of `ACTIVATIONS`.
    epsilon: added to the variance in layer norms.
  """

  width: int
  layers: int
  heads: int
  mlp_width: int
  activation: str
  epsilon: float


@dataclasses.dataclass(frozen=True)
class HFCLIPConfig:
  """Sizes of a CLIP, from config.json.

  Attributes:
    text: causal transformer over the caption.
    image: transformer over patches.
    embed_dim: E.
    vocab_size: number of ids of the text tokenizer.
    text_length: L, longest caption in tokens, start and end included.
    eos_id: id at whose first position a caption is embedded; `OLD_EOS_ID`: at its largest id.
    resolution: S, after preprocessing.
    patch: side of a patch in pixels.
  """

  text: Encoder
  image: Encoder
  embed_dim: int
  vocab_size: int
  text_length: int
  eos_id: int
  resolution: int
  patch: int


def read_config(folder: epath.PathLike) -> HFCLIPConfig:
  """Reads config.json; raises UserError if it is absent, of another model or not supported."""
  from huggingface_hub.errors import StrictDataclassError
  import transformers  # Takes seconds.

  folder = epath.Path(folder)
  if not folder.is_dir():
    raise UserError(
      f"{folder} is not a folder; it must be the folder of a Hugging Face CLIP, from "
      "`hf download NAME --local-dir FOLDER`."
    )
  path = folder / CONFIG
  if not path.exists():
    raise UserError(
      f"{path} does not exist; the folder must be that of a Hugging Face CLIP, with {CONFIG} and "
      f"{WEIGHTS}."
    )
  stored = read_json(path)
  if stored.get("model_type") != "clip":
    raise UserError(f"{path}: model_type is '{stored.get('model_type')}'; it must be 'clip'.")
  try:
    config = transformers.CLIPConfig.from_dict(stored)
  except (TypeError, ValueError, StrictDataclassError) as error:
    raise UserError(f"{path} is not a CLIP config ({error}); download it again.") from error
  text, image = config.text_config, config.vision_config
  for name, value in {
    "text_config.eos_token_id": text.eos_token_id,
    "vision_config.image_size": image.image_size,
    "vision_config.patch_size": image.patch_size,
  }.items():
    if not isinstance(value, int):
      raise UserError(f"{path}: {name} is {value!r}; only a single integer is supported.")
  if image.num_channels != 3:
    raise UserError(f"{path}: vision_config.num_channels is {image.num_channels}; it must be 3.")
  return HFCLIPConfig(
    _encoder(text, f"{path}: text_config"), _encoder(image, f"{path}: vision_config"),
    config.projection_dim, text.vocab_size, text.max_position_embeddings, text.eos_token_id,
    image.image_size, image.patch_size,
  )  # fmt: skip


def _encoder(config, where: str) -> Encoder:
  if config.hidden_act not in ACTIVATIONS:
    raise UserError(
      f"{where}.hidden_act is '{config.hidden_act}'; it must be one of {', '.join(ACTIVATIONS)}."
    )
  return Encoder(
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
    config.intermediate_size, config.hidden_act, config.layer_norm_eps,
  )  # fmt: skip


def layer_shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a layer's tensors by their names in a checkpoint; matrices [out, in]."""
  D, F = encoder.width, encoder.mlp_width
  matrices = {f"self_attn.{name}_proj": (D, D) for name in ("q", "k", "v", "out")}
  matrices |= {"mlp.fc1": (F, D), "mlp.fc2": (D, F)}
  vectors = {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
  norms = {f"layer_norm{i}.{field}": (D,) for i in (1, 2) for field in ("weight", "bias")}
  return {f"{name}.weight": shape for name, shape in matrices.items()} | vectors | norms


def tensor_shapes(config: HFCLIPConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of all tensors of a checkpoint by their names."""
  text, image, E = config.text.width, config.image.width, config.embed_dim
  positions = (config.resolution // config.patch) ** 2 + 1
  shapes = {
    "text_model.embeddings.token_embedding.weight": (config.vocab_size, text),
    "text_model.embeddings.position_embedding.weight": (config.text_length, text),
    "text_model.final_layer_norm.weight": (text,),
    "text_model.final_layer_norm.bias": (text,),
    "text_projection.weight": (E, text),
    "vision_model.embeddings.class_embedding": (image,),
    "vision_model.embeddings.patch_embedding.weight": (image, 3, config.patch, config.patch),
    "vision_model.embeddings.position_embedding.weight": (positions, image),
    "vision_model.pre_layrnorm.weight": (image,),
    "vision_model.pre_layrnorm.bias": (image,),
    "vision_model.post_layernorm.weight": (image,),
    "vision_model.post_layernorm.bias": (image,),
    "visual_projection.weight": (E, image),
  }
  for side, encoder in (("text_model", config.text), ("vision_model", config.image)):
    layer = layer_shapes(encoder)
    for i in range(encoder.layers):
      shapes |= {f"{side}.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
  return shapes


def stack_layers(tensors: dict[str, np.ndarray], config: HFCLIPConfig, dtype) -> dict:
  """Makes parameters of the tensors of a checkpoint, with the layers of each side stacked.

  Names stay; layers become `{side}.layers`. Norms are fp32, other tensors `dtype`.
  """

  def cast(name: str) -> np.ndarray:
    return np.asarray(tensors[name], np.float32 if "norm" in name else dtype)

  params = {name: cast(name) for name in tensor_shapes(config) if ".layers." not in name}
  for side, encoder in (("text_model", config.text), ("vision_model", config.image)):
    layers = [f"{side}.encoder.layers.{i}" for i in range(encoder.layers)]
    params[f"{side}.layers"] = {
      name: np.stack([cast(f"{layer}.{name}") for layer in layers])
      for name in layer_shapes(encoder)
    }
  return params


def read_tensors(folder: epath.PathLike, config: HFCLIPConfig) -> dict[str, np.ndarray]:
  """Reads model.safetensors, or the files of its index.

  Raises:
    UserError: a file is absent or damaged, or a tensor is absent or does not have its shape.
  """
  folder = epath.Path(folder)
  if (folder / WEIGHTS).exists():
    names = [WEIGHTS]
  elif (folder / INDEX).exists():
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
  else:
    raise UserError(
      f"{folder / WEIGHTS} does not exist, nor does {INDEX}; other formats are not supported."
    )
  tensors = {}
  for path in (folder / name for name in names):
    if not path.exists():
      raise UserError(f"{path} does not exist, but {folder / INDEX} names it; download it again.")
    try:
      tensors |= safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
      raise UserError(f"{path} is damaged ({error}); download it again.") from error
  for name, shape in tensor_shapes(config).items():
    if name not in tensors:
      raise UserError(
        f"{folder / WEIGHTS} has no tensor '{name}'; it must hold a CLIPModel, text and vision."
      )
    if tensors[name].shape != shape:
      raise UserError(
        f"{folder / WEIGHTS}: tensor '{name}' is {list(tensors[name].shape)}; "
        f"by {folder / CONFIG} it must be {list(shape)}."
      )
  return tensors


def read_processing(folder: epath.PathLike, config: HFCLIPConfig):
  """Reads the tokenizer and the image processor of a checkpoint; needs no torch.

  Raises:
    UserError: their files are absent or damaged, or do not fit `config`.
  """
  import transformers

  folder = epath.Path(folder)
  bpe = all((folder / name).exists() for name in ("vocab.json", "merges.txt"))
  if not bpe and not (folder / "tokenizer.json").exists():
    raise UserError(
      f"{folder} has no tokenizer; it must hold tokenizer.json, or vocab.json and merges.txt."
    )
  if not any((folder / name).exists() for name in PROCESSORS):
    raise UserError(f"{folder} has no image processor; it must hold {' or '.join(PROCESSORS)}.")
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    pil = transformers.CLIPImageProcessorPil
    processor = pil.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # `tokenizers` raises nothing more precise.
    raise UserError(
      f"{folder}: its tokenizer or image processor cannot be read ({error}); download them again."
    ) from error
  ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
  if None in ends or len(tokenizer) > config.vocab_size:
    raise UserError(
      f"{folder}: its tokenizer has {len(tokenizer)} ids; it must have a start token, an end "
      f"token and at most config.json's vocab_size = {config.vocab_size} ids."
    )
  if config.eos_id not in (OLD_EOS_ID, tokenizer.eos_token_id):
    raise UserError(
      f"{folder}: its tokenizer's end is {tokenizer.eos_token_id}; config.json's eos_token_id = "
      f"{config.eos_id} must be equal."
    )
  S, shape = config.resolution, preprocess(processor, np.zeros((1, 8, 8, 3), np.uint8)).shape
  if shape != (1, 3, S, S):
    raise UserError(
      f"{folder}: its image processor makes images {list(shape[1:])}; by config.json's image_size "
      f"they must be {[3, S, S]}."
    )
  return tokenizer, processor


def preprocess(processor, images: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B 3 S S"]:
  """Scales, crops and normalizes images with the image processor of a checkpoint."""
  # Without input_data_format, an image of height 3 counts as one with its channels first.
  batch = processor(list(images), return_tensors="np", input_data_format="channels_last")
  return np.asarray(batch["pixel_values"], np.float32)


def _norm(x, params: dict, name: str, epsilon: float):
  """Applies a layer norm to [..., D] in fp32; returns the dtype of x."""
  y = jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=epsilon)
  axes = range(x.ndim - 1)
  scale, bias = (jnp.expand_dims(params[f"{name}.{k}"], axes) for k in ("weight", "bias"))
  return (y * scale + bias).astype(x.dtype)


def _linear(x, params: dict, name: str):
  """Applies a linear layer: [B, L, in] -> [B, L, out]."""
  return jnp.einsum("BLI,OI->BLO", x, params[f"{name}.weight"]) + params[f"{name}.bias"][None, None]


def run_layers(
  x: Float[Array, "B L D"], layers: dict, encoder: Encoder, causal: bool
) -> Float[Array, "B L D"]:
  """Applies K layers, whose parameters are stacked along their first axis."""
  B, L, D = x.shape
  heads = (B, L, encoder.heads, D // encoder.heads)

  def layer(x, params):
    y = _norm(x, params, "layer_norm1", encoder.epsilon)
    qkv = (_linear(y, params, f"self_attn.{name}_proj").reshape(heads) for name in "qkv")
    # The softmax is in fp32.
    y = jax.nn.dot_product_attention(*qkv, is_causal=causal).reshape(B, L, D)
    x = x + _linear(y, params, "self_attn.out_proj")
    y = _linear(_norm(x, params, "layer_norm2", encoder.epsilon), params, "mlp.fc1")
    return x + _linear(ACTIVATIONS[encoder.activation](y), params, "mlp.fc2"), None

  return jax.lax.scan(layer, x, layers)[0]


def _project(x, weight):
  """Projects [B, D] to [B, E] fp32 of norm 1."""
  return normalize(jnp.einsum("BD,ED->BE", x, weight, preferred_element_type=jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def embed_tokens(
  config: HFCLIPConfig, params: dict, tokens: Int32[Array, "B L"]
) -> Float32[Array, "B E"]:
  """Embeds captions with start and end, with norm 1; tokens after the end do not matter."""
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
  """Embeds preprocessed images with norm 1."""
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
  """A Hugging Face CLIP with the methods of `model.CLIP`.

  Every device has all parameters and embeds its rows of a batch. All batches have one shape.
  """

  resolution = None  # Images may have any size: preprocessing scales and crops them.

  def __init__(
    self,
    config: HFCLIPConfig,
    params: dict,
    tokenizer,
    processor,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Puts `params`, see `stack_layers`, on `devices`, by default all of this host.

    The tokenizer and the image processor are those of `read_processing`.
    """
    devices = list(devices or jax.local_devices())
    self.mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    self.config, self.tokenizer, self.processor = config, tokenizer, processor
    self.params = jax.device_put(params, NamedSharding(self.mesh, P()))

  @classmethod
  def load(
    cls,
    folder: epath.PathLike,
    dtype: str = "bfloat16",
    devices: Sequence[jax.Device] | None = None,
  ) -> "HFCLIP":
    """Reads a checkpoint that computes in `dtype`, of `DTYPES`; raises UserError if it is wrong."""
    if dtype not in DTYPES:
      raise ValueError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}.")
    config = read_config(folder)
    processing = read_processing(folder, config)
    params = stack_layers(read_tensors(folder, config), config, jnp.dtype(dtype))
    return cls(config, params, *processing, devices)

  def encode(self, caption: str) -> Int32[np.ndarray, " L"]:
    """Encodes a caption, without start and end."""
    encoding = self.tokenizer(caption, add_special_tokens=False, verbose=False)
    return np.array(encoding["input_ids"], np.int32)

  def pad_texts(self, texts: Sequence[Int[np.ndarray, " _"]]) -> Int32[np.ndarray, "B L"]:
    """Makes rows of start, as many ids of a caption as fit, end, padding."""
    start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
    pad = self.tokenizer.pad_token_id
    tokens = np.full((len(texts), self.config.text_length), end if pad is None else pad, np.int32)
    for row, ids in zip(tokens, texts):
      ids = [start, *ids[: self.config.text_length - 2], end]
      row[: len(ids)] = ids
    return tokens

  def embed_texts(self, texts: Sequence[Int[np.ndarray, " _"]]) -> Float32[np.ndarray, "B E"]:
    """Embeds captions, given as ids of `encode`, with norm 1."""
    return self._batched(embed_tokens, self.pad_texts(texts), lambda rows: rows)

  def embed_images(self, images: np.ndarray) -> Float32[np.ndarray, "B E"]:
    """Embeds images, uint8 [B, H, W, 3] of any size, with norm 1; raises UserError at others."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise UserError(
        f"images for CLIP are {images.dtype}{list(images.shape)}; they must be uint8[B, H, W, 3]."
      )
    return self._batched(embed_pixels, images, functools.partial(preprocess, self.processor))

  def _batched(self, embed, rows: np.ndarray, prepare) -> np.ndarray:
    """Embeds `prepare(rows)` in batches of one shape, the last padded with zeros."""
    size, sharding = ROWS_PER_DEVICE * self.mesh.size, NamedSharding(self.mesh, P("data"))
    out = np.zeros((len(rows), self.config.embed_dim), np.float32)
    for start in range(0, len(rows), size):
      batch = prepare(rows[start : start + size])
      padded = np.pad(batch, ((0, size - len(batch)),) + ((0, 0),) * (batch.ndim - 1))
      with jax.set_mesh(self.mesh):  # The caller's mesh has other axes.
        result = embed(self.config, self.params, jax.device_put(padded, sharding))
      out[start : start + len(batch)] = np.asarray(result)[: len(batch)]
    return out
