"""Hugging Face CLIP checkpoints (ViT-B/32, ViT-L/14 and their like) in JAX; embeds as transformers' CLIPModel does."""

# B batch, L length, D width, F feed-forward, N heads, H head size, E embedding, P patch, S side, K layers.

from collections.abc import Sequence
import dataclasses
import functools

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
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
OLD_EOS_ID = 2  # What checkpoints of before transformers 4.31 call `</s>`; their tokenizer's is the largest id.
ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A transformer of pre-norm layers.

  Attributes:
    width: D.
    layers: K.
    heads: N.
    mlp_width: F.
    activation: of `ACTIVATIONS`.
    epsilon: of the layer norms.
  """

  width: int
  layers: int
  heads: int
  mlp_width: int
  activation: str
  epsilon: float


@dataclasses.dataclass(frozen=True)
class HFCLIPConfig:
  """What config.json says.

  Attributes:
    text: the causal transformer over the caption.
    image: the transformer over patches.
    embed_dim: E.
    vocab_size: ids of the text tokenizer.
    text_length: L, longest caption in tokens, start and end included.
    eos_id: the id at whose first position the caption is read off; `OLD_EOS_ID`: at the largest id instead.
    resolution: S of the images after the preprocessing.
    patch: P.
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
  """Reads config.json. Raises UserError if it is absent, another model's or of a CLIP that is not supported."""
  from huggingface_hub.errors import StrictDataclassError
  import transformers  # Takes seconds; only who has such a checkpoint waits for it.

  folder = epath.Path(folder)
  if not folder.is_dir():
    raise UserError(
      f"{folder} is no folder; it must be one of a Hugging Face CLIP, as `hf download NAME --local-dir FOLDER` makes it."
    )
  path = folder / CONFIG
  if not path.exists():
    raise UserError(
      f"{path} does not exist; the folder must be that of a Hugging Face CLIP, with {CONFIG} and {WEIGHTS}."
    )
  stored = read_json(path)
  if stored.get("model_type") != "clip":
    raise UserError(f"{path}: model_type is '{stored.get('model_type')}'; it must be 'clip'.")
  try:
    config = transformers.CLIPConfig.from_dict(stored)
  except (TypeError, ValueError, StrictDataclassError) as error:
    raise UserError(f"{path} is no config of a CLIP ({error}); download it again.") from error
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
    _encoder(text, f"{path}: text_config"), _encoder(image, f"{path}: vision_config"), config.projection_dim, text.vocab_size,
    text.max_position_embeddings, text.eos_token_id, image.image_size, image.patch_size,
  )  # fmt: skip


def _encoder(config, where: str) -> Encoder:
  if config.hidden_act not in ACTIVATIONS:
    raise UserError(
      f"{where}.hidden_act is '{config.hidden_act}'; it must be one of {', '.join(ACTIVATIONS)}."
    )
  return Encoder(
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size, config.hidden_act,
    config.layer_norm_eps,
  )  # fmt: skip


def layer_shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
  """Tensors of one layer under their names in a checkpoint; matrices are [out, in]."""
  D, F = encoder.width, encoder.mlp_width
  matrices = {f"self_attn.{name}_proj": (D, D) for name in ("q", "k", "v", "out")} | {
    "mlp.fc1": (F, D),
    "mlp.fc2": (D, F),
  }
  vectors = {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
  norms = {f"layer_norm{i}.{part}": (D,) for i in (1, 2) for part in ("weight", "bias")}
  return {f"{name}.weight": shape for name, shape in matrices.items()} | vectors | norms


def tensor_shapes(config: HFCLIPConfig) -> dict[str, tuple[int, ...]]:
  """Every tensor that a checkpoint must hold, under the name that it has there."""
  text, image, E = config.text.width, config.image.width, config.embed_dim
  shapes = {
    "text_model.embeddings.token_embedding.weight": (config.vocab_size, text),
    "text_model.embeddings.position_embedding.weight": (config.text_length, text),
    "text_model.final_layer_norm.weight": (text,),
    "text_model.final_layer_norm.bias": (text,),
    "text_projection.weight": (E, text),
    "vision_model.embeddings.class_embedding": (image,),
    "vision_model.embeddings.patch_embedding.weight": (image, 3, config.patch, config.patch),
    "vision_model.embeddings.position_embedding.weight": (
      (config.resolution // config.patch) ** 2 + 1,
      image,
    ),
    "vision_model.pre_layrnorm.weight": (image,),
    "vision_model.pre_layrnorm.bias": (image,),
    "vision_model.post_layernorm.weight": (image,),
    "vision_model.post_layernorm.bias": (image,),
    "visual_projection.weight": (E, image),
  }
  for side, encoder in (("text_model", config.text), ("vision_model", config.image)):
    for i in range(encoder.layers):
      shapes |= {
        f"{side}.encoder.layers.{i}.{name}": shape for name, shape in layer_shapes(encoder).items()
      }
  return shapes


def stack_layers(tensors: dict[str, np.ndarray], config: HFCLIPConfig, dtype) -> dict:
  """A checkpoint's tensors -> parameters: as they are named, but the layers of each side stacked as `{side}.layers`.

  Norms stay fp32; the rest is cast to `dtype`.
  """
  cast = lambda name, x: np.asarray(x, np.float32 if "norm" in name else dtype)
  params = {
    name: cast(name, tensors[name]) for name in tensor_shapes(config) if ".layers." not in name
  }
  for side, encoder in (("text_model", config.text), ("vision_model", config.image)):
    rows = lambda name: [
      cast(name, tensors[f"{side}.encoder.layers.{i}.{name}"])  # noqa: B023
      for i in range(encoder.layers)  # noqa: B023
    ]
    params[f"{side}.layers"] = {name: np.stack(rows(name)) for name in layer_shapes(encoder)}
  return params


def read_tensors(folder: epath.PathLike, config: HFCLIPConfig) -> dict[str, np.ndarray]:
  """Reads model.safetensors, or the files that its index names.

  Raises:
    UserError: a file is absent or damaged, or a tensor that `config` asks for is absent or of another shape.
  """
  folder = epath.Path(folder)
  if (folder / WEIGHTS).exists():
    names = [WEIGHTS]
  elif (folder / INDEX).exists():
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
  else:
    raise UserError(
      f"{folder / WEIGHTS} does not exist, nor does {INDEX}; weights in other formats are not read."
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
        f"{folder / WEIGHTS} has no tensor '{name}'; it must hold a whole CLIPModel, text and vision."
      )
    if tensors[name].shape != shape:
      raise UserError(
        f"{folder / WEIGHTS}: tensor '{name}' is {list(tensors[name].shape)}; {folder / CONFIG} makes it {list(shape)}."
      )
  return tensors


def read_processing(folder: epath.PathLike, config: HFCLIPConfig):
  """The tokenizer and the image processor of a checkpoint, from transformers; needs neither torch nor torchvision.

  Raises:
    UserError: the files of one are absent or damaged, or do not fit `config`.
  """
  import transformers

  folder = epath.Path(folder)
  if not (folder / "tokenizer.json").exists() and not all(
    (folder / n).exists() for n in ("vocab.json", "merges.txt")
  ):
    raise UserError(
      f"{folder} has no tokenizer; it must hold tokenizer.json, or vocab.json and merges.txt."
    )
  if not any((folder / name).exists() for name in PROCESSORS):
    raise UserError(f"{folder} has no image processor; it must hold {' or '.join(PROCESSORS)}.")
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(
      str(folder), local_files_only=True
    )
  except Exception as error:  # `tokenizers` raises nothing more precise.
    raise UserError(
      f"{folder}: its tokenizer or image processor cannot be read ({error}); download them again."
    ) from error
  if (
    tokenizer.bos_token_id is None
    or tokenizer.eos_token_id is None
    or len(tokenizer) > config.vocab_size
  ):
    raise UserError(
      f"{folder}: its tokenizer has {len(tokenizer)} ids; it must have a start and an end token and "
      f"at most config.json's vocab_size = {config.vocab_size} ids."
    )
  if config.eos_id not in (OLD_EOS_ID, tokenizer.eos_token_id):
    raise UserError(
      f"{folder}: its tokenizer's end is {tokenizer.eos_token_id}; config.json's eos_token_id = {config.eos_id} must be it."
    )
  S, shape = config.resolution, preprocess(processor, np.zeros((1, 8, 8, 3), np.uint8)).shape
  if shape != (1, 3, S, S):
    raise UserError(
      f"{folder}: its image processor makes images {list(shape[1:])}; config.json's image_size asks for {S}."
    )
  return tokenizer, processor


def preprocess(processor, images: np.ndarray) -> np.ndarray:
  """[B, H, W, 3] uint8 -> [B, 3, S, S] float32, scaled, cropped and normalized as the checkpoint's image processor says."""
  # Without input_data_format, an image of 3 pixels' height would be taken for one with its channels first.
  pixels = processor(list(images), return_tensors="np", input_data_format="channels_last")[
    "pixel_values"
  ]
  return np.asarray(pixels, np.float32)


def _norm(x, params: dict, name: str, epsilon: float):
  """Layer norm of [..., D] in fp32; returns x's dtype."""
  y = jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=epsilon)
  scale, bias = (
    jnp.expand_dims(params[f"{name}.{part}"], range(x.ndim - 1)) for part in ("weight", "bias")
  )
  return (y * scale + bias).astype(x.dtype)


def _linear(x, params: dict, name: str):
  """[B, L, in] -> [B, L, out]."""
  return jnp.einsum("BLI,OI->BLO", x, params[f"{name}.weight"]) + params[f"{name}.bias"][None, None]


def run_layers(x, layers: dict, encoder: Encoder, causal: bool):
  """[B, L, D] through K layers, whose parameters are stacked along their first axis."""
  B, L, D = x.shape
  heads = lambda y: y.reshape(B, L, encoder.heads, D // encoder.heads)

  def layer(x, params):
    y = _norm(x, params, "layer_norm1", encoder.epsilon)
    q, k, v = (heads(_linear(y, params, f"self_attn.{name}_proj")) for name in ("q", "k", "v"))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(
      B, L, D
    )  # Its softmax is in fp32.
    x = x + _linear(y, params, "self_attn.out_proj")
    y = _linear(_norm(x, params, "layer_norm2", encoder.epsilon), params, "mlp.fc1")
    return x + _linear(ACTIVATIONS[encoder.activation](y), params, "mlp.fc2"), None

  return jax.lax.scan(layer, x, layers)[0]


def _project(x, weight):
  """[B, D] -> [B, E] fp32 of norm 1."""
  return normalize(jnp.einsum("BD,ED->BE", x, weight, preferred_element_type=jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def embed_tokens(config: HFCLIPConfig, params: dict, tokens):
  """[B, L] int32, start and end included -> [B, E] fp32 of norm 1. What follows the end does not matter."""
  with jax.default_matmul_precision("highest"):
    positions = params["text_model.embeddings.position_embedding.weight"][None, : tokens.shape[1]]
    x = params["text_model.embeddings.token_embedding.weight"][tokens] + positions
    x = run_layers(x, params["text_model.layers"], config.text, causal=True)
    end = jnp.argmax(tokens if config.eos_id == OLD_EOS_ID else tokens == config.eos_id, 1)
    x = jnp.take_along_axis(x, end[:, None, None], 1)[:, 0]
    return _project(
      _norm(x, params, "text_model.final_layer_norm", config.text.epsilon),
      params["text_projection.weight"],
    )


@functools.partial(jax.jit, static_argnums=0)
def embed_pixels(config: HFCLIPConfig, params: dict, pixels):
  """[B, 3, S, S] float32, preprocessed -> [B, E] fp32 of norm 1."""
  with jax.default_matmul_precision("highest"):
    kernel = params["vision_model.embeddings.patch_embedding.weight"]
    B, side, size = len(pixels), config.resolution // config.patch, config.patch
    pixels = pixels[:, :, : side * size, : side * size].astype(kernel.dtype)
    x = jnp.einsum(
      "BChpwq,DCpq->BhwD", pixels.reshape(B, 3, side, size, side, size), kernel
    ).reshape(B, side**2, -1)
    first = jnp.broadcast_to(
      params["vision_model.embeddings.class_embedding"], (B, 1, config.image.width)
    )
    x = (
      jnp.concatenate([first, x], 1)
      + params["vision_model.embeddings.position_embedding.weight"][None]
    )
    x = _norm(x, params, "vision_model.pre_layrnorm", config.image.epsilon)
    x = run_layers(x, params["vision_model.layers"], config.image, causal=False)[:, 0]
    return _project(
      _norm(x, params, "vision_model.post_layernorm", config.image.epsilon),
      params["visual_projection.weight"],
    )


class HFCLIP:
  """A Hugging Face CLIP, ready to embed; used as `clip.CLIP` is.

  Its parameters lie on every device, each of which embeds its part of a batch. All batches have one shape.
  """

  resolution = (
    None  # Images may be of any size: the checkpoint's own preprocessing scales and crops them.
  )

  def __init__(
    self,
    config: HFCLIPConfig,
    params: dict,
    tokenizer,
    processor,
    devices: Sequence[jax.Device] | None = None,
  ):
    """`params` as `stack_layers` makes them; `tokenizer` and `processor` are transformers'; `devices`: all of this host's."""
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
    """Reads a checkpoint; computes in `dtype` (of `DTYPES`). Raises UserError naming what is absent or does not fit."""
    if dtype not in DTYPES:
      raise ValueError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}.")
    config = read_config(folder)
    tokenizer, processor = read_processing(folder, config)
    return cls(
      config,
      stack_layers(read_tensors(folder, config), config, jnp.dtype(dtype)),
      tokenizer,
      processor,
      devices,
    )

  def encode(self, caption: str) -> np.ndarray:
    """Caption -> int32 ids of the checkpoint's tokenizer, without start and end."""
    return np.array(
      self.tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"], np.int32
    )

  def pad_texts(self, texts: Sequence[np.ndarray]) -> np.ndarray:
    """B arrays of ids -> [B, L] int32: start, the ids as far as there is room, end, padding."""
    start, end, pad = (
      self.tokenizer.bos_token_id,
      self.tokenizer.eos_token_id,
      self.tokenizer.pad_token_id,
    )
    tokens = np.full((len(texts), self.config.text_length), end if pad is None else pad, np.int32)
    for row, ids in zip(tokens, texts):
      ids = [start, *ids[: self.config.text_length - 2], end]
      row[: len(ids)] = ids
    return tokens

  def embed_texts(self, texts: Sequence[np.ndarray]) -> np.ndarray:
    """B arrays of ids, as `encode` gives them -> [B, E] float32 of norm 1."""
    return self._batched(embed_tokens, self.pad_texts(texts), lambda rows: rows)

  def embed_images(self, images: np.ndarray) -> np.ndarray:
    """[B, H, W, 3] uint8 of any size -> [B, E] float32 of norm 1. Raises UserError at other arrays."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise UserError(
        f"images for CLIP are {images.dtype}{list(images.shape)}; they must be uint8[B, H, W, 3]."
      )
    return self._batched(embed_pixels, images, functools.partial(preprocess, self.processor))

  def _batched(self, embed, rows: np.ndarray, prepare) -> np.ndarray:
    """Embeds `rows` in batches of one shape, filled up with zeros; `prepare` makes a batch what `embed` takes."""
    size = ROWS_PER_DEVICE * self.mesh.size
    out = np.zeros((len(rows), self.config.embed_dim), np.float32)
    for start in range(0, len(rows), size):
      batch = prepare(rows[start : start + size])
      padded = np.pad(batch, ((0, size - len(batch)),) + ((0, 0),) * (batch.ndim - 1))
      with jax.set_mesh(self.mesh):  # The caller's mesh, if there is one, has other axes.
        result = embed(
          self.config, self.params, jax.device_put(padded, NamedSharding(self.mesh, P("data")))
        )
      out[start : start + len(batch)] = np.asarray(result)[: len(batch)]
    return out
