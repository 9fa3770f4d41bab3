"""Reads the files of a Hugging Face CLIP model: config, tensors, tokenizer, image processor."""

# B batch, D width of a layer, F width of the feed-forward part, N heads, K layers,
# E width of embeddings, H height, W width, S side of the images in pixels.

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from etils import epath
import jax
from jaxtyping import Float32, UInt8
import numpy as np
import numpy.typing as npt

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_foreign_json
from cm3leon_jax.weights.stored_tensors import StoredTensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Before transformers 4.31, config.json files had this wrong value of `eos_token_id`. In these
# checkpoints, the end token is the largest id of the tokenizer.
OLD_EOS_ID = 2
ACTIVATIONS: dict[str, Callable] = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class EncoderSizes:
  """Sizes of a transformer with pre-norm layers.

  Attributes:
    width, layers, heads, mlp_width: D, K, N and F; for these letters, see the start of the file.
    activation: key of `ACTIVATIONS`.
    epsilon: number that each layer norm adds to the variance.
  """

  width: int
  layers: int
  heads: int
  mlp_width: int
  activation: str
  epsilon: float


@dataclasses.dataclass(frozen=True)
class HFCLIPConfig:
  """Sizes of a CLIP model, from config.json.

  Attributes:
    text: sizes of the causal transformer over the caption.
    image: sizes of the transformer over patches.
    embed_dim: E.
    text_length: L, largest number of tokens of a caption, including start and end token.
    eos_id: id of the end token. The output at the first end token becomes the embedding of the
      caption. If `eos_id` is `OLD_EOS_ID`, the output at the largest id of the caption is used.
    resolution: S, side of the images after preprocessing, in pixels.
    patch: side of a patch in pixels.
  """

  text: EncoderSizes
  image: EncoderSizes
  embed_dim: int
  vocab_size: int
  text_length: int
  eos_id: int
  resolution: int
  patch: int


def read_config(folder: epath.PathLike) -> HFCLIPConfig:
  """Reads config.json. Raises UserError if it is absent, unsupported or of another model class."""
  from huggingface_hub.errors import StrictDataclassError
  import transformers  # Imported here, because the import takes seconds.

  path = epath.Path(folder) / CONFIG
  if not path.exists():
    raise UserError(
      f"{path} does not exist; name the folder of a Hugging Face CLIP, from `hf download NAME "
      "--local-dir FOLDER`."
    )
  stored = read_foreign_json(path, {})
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


def _encoder(config: Any, where: str) -> EncoderSizes:
  if config.hidden_act not in ACTIVATIONS:
    raise UserError(
      f"{where}.hidden_act is '{config.hidden_act}'; it must be one of {', '.join(ACTIVATIONS)}."
    )
  return EncoderSizes(
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
    config.intermediate_size, config.hidden_act, config.layer_norm_eps,
  )  # fmt: skip


def layer_shapes(encoder: EncoderSizes) -> dict[str, tuple[int, ...]]:
  """Maps the name of each tensor of a layer to its shape. Matrices are [out, in]."""
  D, F = encoder.width, encoder.mlp_width
  matrices: dict[str, tuple[int, ...]]
  matrices = {f"self_attn.{name}_proj": (D, D) for name in ("q", "k", "v", "out")}
  matrices |= {"mlp.fc1": (F, D), "mlp.fc2": (D, F)}
  vectors = {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
  norms = {f"layer_norm{i}.{field}": (D,) for i in (1, 2) for field in ("weight", "bias")}
  return {f"{name}.weight": shape for name, shape in matrices.items()} | vectors | norms


def tensor_shapes(config: HFCLIPConfig) -> dict[str, tuple[int, ...]]:
  """Maps the name of each tensor of a checkpoint to its shape."""
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


def stack_layers(
  tensors: dict[str, np.ndarray], config: HFCLIPConfig, dtype: npt.DTypeLike
) -> dict:
  """Converts the tensors of a checkpoint to parameters, and stacks the layers of each encoder.

  Tensors keep their names, except that the stacked layers are in `{side}.layers`. The parameters of
  norms are fp32. Other parameters have the dtype `dtype`.
  """

  def cast(name: str) -> np.ndarray:
    return np.asarray(tensors[name], np.float32 if "norm" in name else dtype)

  params: dict[str, Any]
  params = {name: cast(name) for name in tensor_shapes(config) if ".layers." not in name}
  for side, encoder in (("text_model", config.text), ("vision_model", config.image)):
    layers = [f"{side}.encoder.layers.{i}" for i in range(encoder.layers)]
    params[f"{side}.layers"] = {
      name: np.stack([cast(f"{layer}.{name}") for layer in layers])
      for name in layer_shapes(encoder)
    }
  return params


def read_tensors(folder: epath.PathLike, config: HFCLIPConfig) -> dict[str, np.ndarray]:
  """Reads model.safetensors, or the files that its index names.

  Raises:
    UserError: a file is absent or damaged, or a tensor is absent, is not finite, or has a wrong
      shape.
  """
  tensors = StoredTensors(folder)
  for name, shape in tensor_shapes(config).items():
    tensors.check_shape(name, shape)
  return {name: tensors.read(name) for name in tensor_shapes(config)}


def read_processing(folder: epath.PathLike, config: HFCLIPConfig) -> tuple[Any, Any]:
  """Reads the tokenizer and the image processor of a checkpoint, without torch.

  Raises:
    UserError: the files are absent or damaged, or do not fit `config`.
  """
  import transformers

  folder = epath.Path(folder)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    pil = transformers.CLIPImageProcessorPil
    processor = pil.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # `tokenizers` raises only plain Exceptions.
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
      f"{folder}: the end token of its tokenizer is {tokenizer.eos_token_id}; it must be "
      f"config.json's eos_token_id = {config.eos_id}."
    )
  S, shape = config.resolution, preprocess(processor, np.zeros((1, 8, 8, 3), np.uint8)).shape
  if shape != (1, 3, S, S):
    raise UserError(
      f"{folder}: its image processor makes images {list(shape[1:])}; config.json's image_size "
      f"requires {[3, S, S]}."
    )
  return tokenizer, processor


def preprocess(
  processor: Callable[..., Mapping[str, Any]], images: UInt8[np.ndarray, "B H W 3"]
) -> Float32[np.ndarray, "B 3 S S"]:
  """Scales, crops and normalizes images with the image processor of a checkpoint."""
  # Without `input_data_format`, the processor would read an image of height 3 as channels first.
  batch = processor(list(images), return_tensors="np", input_data_format="channels_last")
  return np.asarray(batch["pixel_values"], np.float32)
