"""Converts decoders between this package's parameters and the files of `transformers`.

`LAYOUTS` contains a layout for each value of `config.model.family`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math

import numpy as np

from cm3leon_jax.config.model import ROPE_BASE, ModelConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.models import transformer
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights.stored import StoredParams
from cm3leon_jax.weights.tensor_files import Tensor

POSITION_IDS = (
  "This decoder counts positions from the images. A sample with at most one image needs no "
  "position_ids. After retrieved documents, or with several images, pass them: split the sample "
  "after every <break> that follows an image code; in each part, position 0 is the token after the "
  "last <break> or </s> before the first image code, and the others count from it, down before it "
  "and up after it; a part without image codes counts on from the part before it. If an engine "
  "takes no negative positions, add one number to all positions of the sample: attention depends "
  "on their differences alone."
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Layout of a decoder in `transformers`.

  Attributes:
    architecture: class name in transformers.
    model_type: name in config.json.
    prefix: prefix of the names of its tensors.
    tables: name of our parameter -> name of the tensor, for parameters outside the layers, in the
      order in which files store them.
    products: the same inside a layer, for the feed-forward matrices.
    norms: the same inside a layer, for the scales and biases of norms, with the tensor's suffix.
    out: name, inside a layer, of the tensor of attention's output projection.
    first_position: row of the position table that contains position 0.
    check: raises UserError if the layout cannot represent a decoder.
    describe: model config -> the fields of config.json that only this layout has.
    read_fields: content of config.json -> the fields of the config section `model` that only this
      layout has.
  """

  architecture: str
  model_type: str
  prefix: str
  tables: Mapping[str, str]
  products: Mapping[str, str]
  norms: Mapping[str, str]
  out: str
  first_position: int
  check: Callable[[ModelConfig], None]
  describe: Callable[[ModelConfig], dict]
  read_fields: Callable[[dict], dict]


# config.model.activation -> its name in transformers.
OPT_ACTIVATIONS = {"": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _describe_opt(config: ModelConfig) -> dict:
  return {
    "activation_function": OPT_ACTIVATIONS[config.activation],
    "do_layer_norm_before": True,
    "layer_norm_elementwise_affine": False,
    "enable_bias": False,
    "word_embed_proj_dim": config.width,
    "ffn_dim": config.mlp_width,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "tie_word_embeddings": True,
  }


def _fields_of_opt(described: dict) -> dict:
  """Reads the fields of the config section `model` that only OPT's config.json contains."""
  names = {theirs: ours for ours, theirs in OPT_ACTIVATIONS.items()}
  return {
    "mlp_width": described["ffn_dim"],
    "activation": names[described["activation_function"]],
    "query_key_norm": False,
    "head_size": 0,
  }


def _check_opt(config: ModelConfig) -> None:
  if config.query_key_norm:
    raise UserError(
      "config.model.query_key_norm is set, but OPTForCausalLM has no such norm: this decoder "
      "cannot be exported in the format hf."
    )
  _check_head_size(config)


def _check_head_size(config: ModelConfig) -> None:
  if config.head_dim * config.num_heads != config.width:
    raise UserError(
      f"config.model.head_size is {config.head_size}, but the heads of "
      f"{layout_of(config).architecture} have the size width / num_heads = {config.width} / "
      f"{config.num_heads}: this decoder cannot be exported."
    )


def _describe_rotary(config: ModelConfig) -> dict:
  return {
    "hidden_act": "silu",
    "intermediate_size": config.mlp_width,
    "num_key_value_heads": config.key_heads,
    "rms_norm_eps": config.traits.norm_eps,
    "rope_theta": config.rotary_base,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
  }


def _describe_qwen3(config: ModelConfig) -> dict:
  return {**_describe_rotary(config), "head_dim": config.head_dim}


def _fields_of_qwen3(described: dict) -> dict:
  size, base = described["head_dim"], float(described["rope_theta"])
  heads, key_heads = described["num_attention_heads"], described["num_key_value_heads"]
  usual = size * heads == described["hidden_size"]
  return {
    "num_kv_heads": 0 if key_heads == heads else key_heads,
    "mlp_width": described["intermediate_size"],
    "head_size": 0 if usual else size,
    "rope_base": 0.0 if base == ROPE_BASE else base,
  }


def _describe_chameleon(config: ModelConfig) -> dict:
  return {**_describe_rotary(config), "mlp_bias": False, "swin_norm": config.swin_norm}


def _fields_of_chameleon(described: dict) -> dict:
  size = described["hidden_size"] // described["num_attention_heads"]
  fields = _fields_of_qwen3({**described, "head_dim": size})
  return {**fields, "swin_norm": described["swin_norm"]}


_QWEN3 = Layout(
  architecture="Qwen3ForCausalLM",
  model_type="qwen3",
  prefix="model",
  tables={"embed": "model.embed_tokens", "final_norm.scale": "model.norm", "head": "lm_head"},
  products={name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
  norms={
    "q_norm.scale": "self_attn.q_norm.weight",
    "k_norm.scale": "self_attn.k_norm.weight",
    "norm1.scale": "input_layernorm.weight",
    "norm2.scale": "post_attention_layernorm.weight",
  },
  out="self_attn.o_proj",
  first_position=0,
  check=lambda config: None,  # The layout can represent every decoder.
  describe=_describe_qwen3,
  read_fields=_fields_of_qwen3,
)
# Family -> the layout in which its decoders are exported.
LAYOUTS = {
  "opt": Layout(
    architecture="OPTForCausalLM",
    model_type="opt",
    prefix="model.decoder",
    tables={"embed": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions"},
    products={"up": "fc1", "down": "fc2"},
    norms={},
    out="self_attn.out_proj",
    first_position=2,  # OPT never reads rows 0 and 1.
    check=_check_opt,
    describe=_describe_opt,
    read_fields=_fields_of_opt,
  ),
  "modern": _QWEN3,
  "chameleon": dataclasses.replace(
    _QWEN3,
    architecture="ChameleonForConditionalGeneration",
    model_type="chameleon",
    norms={
      **_QWEN3.norms,
      "q_norm.bias": "self_attn.q_norm.bias",
      "k_norm.bias": "self_attn.k_norm.bias",
    },
    check=_check_head_size,
    describe=_describe_chameleon,
    read_fields=_fields_of_chameleon,
  ),
}
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")


def layout_of(config: ModelConfig) -> Layout:
  """Returns the layout for a decoder's family."""
  return LAYOUTS[config.family]


def tensors_of(layout: Layout, params: StoredParams, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of a decoder in a layout. Matrices are [out, in]."""
  tensors = [_table(layout, params, name, dtype) for name in layout.tables]
  places = transformer.places([name.removeprefix("blocks.") for name in params.shapes])
  for i in range(params.shapes["blocks.up"][0]):
    layer = f"{layout.prefix}.layers.{i}"
    tensors += [
      transposed(f"{layer}.{name}.weight", params, f"blocks.{source}", i, *index, dtype=dtype)
      for name, (source, index) in zip(QKV, places)
    ]
    out = f"{layer}.{layout.out}.weight"
    tensors.append(transposed(out, params, "blocks.out", i, dtype=dtype, axes_in=2))
    tensors += [
      as_stored(f"{layer}.{theirs}", params, f"blocks.{ours}", i, dtype=dtype)
      for ours, theirs in layout.norms.items()
    ]
    tensors += [
      transposed(f"{layer}.{theirs}.weight", params, f"blocks.{ours}", i, dtype=dtype)
      for ours, theirs in layout.products.items()
    ]
  return tensors


def _table(layout: Layout, params: StoredParams, name: str, dtype: str) -> Tensor:
  theirs = f"{layout.tables[name]}.weight"
  if name != "positions" or not layout.first_position:
    return as_stored(theirs, params, name, dtype=dtype)
  rows, width = params.shapes[name]

  def positions() -> np.ndarray:
    return np.pad(params.read(name), ((layout.first_position, 0), (0, 0)))

  return Tensor(theirs, (rows + layout.first_position, width), dtype, positions)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape for the tensors that `tensors_of` lists."""
  layout = layout_of(config)
  D, F, H = config.width, config.mlp_width, config.head_dim
  rows = {"positions": config.max_positions + layout.first_position}
  tables = {
    f"{theirs}.weight": (D,) if ours.endswith(".scale") else (rows.get(ours, config.vocab_size), D)
    for ours, theirs in layout.tables.items()
  }
  sizes = (config.num_heads, config.key_heads, config.key_heads)
  matrices = {name: (n * H, D) for name, n in zip(QKV, sizes)}
  matrices[layout.out] = (D, config.num_heads * H)
  matrices |= {theirs: (D, F) if x == "down" else (F, D) for x, theirs in layout.products.items()}
  layer: dict[str, tuple[int, ...]] = {f"{name}.weight": x for name, x in matrices.items()}
  heads, biased = dict(zip(("q_norm", "k_norm"), sizes)), config.traits.biased_head_norms
  for ours, theirs in layout.norms.items():
    count = heads.get(ours.split(".")[0])
    layer[theirs] = (D,) if count is None else (count, H) if biased else (H,)
  return tables | {
    f"{layout.prefix}.layers.{i}.{name}": shape
    for i in range(config.num_layers)
    for name, shape in layer.items()
  }


def as_stored(name: str, params: StoredParams, source: str, *index: int, dtype: str) -> Tensor:
  """Returns the tensor `name`: the stored array `source`, or its part at `index`, unchanged."""
  shape = params.shapes[source][len(index) :]
  return Tensor(name, shape, dtype, functools.partial(params.read, source, *index))


def transposed(
  name: str, params: StoredParams, source: str, *index: int, dtype: str, axes_in: int = 1
) -> Tensor:
  """Returns a stored matrix as [out, in]. Its first `axes_in` axes are the input."""
  shape = params.shapes[source][len(index) :]
  rows, columns = math.prod(shape[:axes_in]), math.prod(shape[axes_in:])

  def make() -> np.ndarray:
    return params.read(source, *index).reshape(rows, columns).T

  return Tensor(name, (columns, rows), dtype, make)


def config_of(described: dict) -> dict[str, dict]:
  """Returns the fields of the config sections `model` and `vocab`; the inverse of `hf_config`.

  Raises:
    KeyError: a field is absent or unknown, so `hf_config` did not write `described`.
  """
  families = {layout.model_type: family for family, layout in LAYOUTS.items()}
  if (family := families.get(described["model_type"])) is None:
    raise KeyError(f"model_type {' or '.join(map(repr, families))}")
  model = {
    "family": family,
    "vocab_size": described["vocab_size"],
    "num_layers": described["num_hidden_layers"],
    "width": described["hidden_size"],
    "num_heads": described["num_attention_heads"],
    "max_positions": described["max_position_embeddings"],
    "align_images": described["cm3leon"].get("align_images", False),
    **LAYOUTS[family].read_fields(described),
  }
  return {"model": model, "vocab": dataclasses.asdict(vocab_of(described["cm3leon"]))}


def vocab_of(own: Mapping) -> VocabLayout:
  """Returns the vocabulary that `hf_config` describes in the field `cm3leon`."""
  sizes = {name: own[name] for name in VocabLayout().sizes}
  return VocabLayout(**sizes, template=own.get("template", "cm3leon"))


def hf_config(config: ModelConfig, vocab: VocabLayout) -> dict:
  """Returns the content of config.json. Image code c has the token id `cm3leon.text_size` + c.

  If an engine's default positions are wrong for this decoder, `cm3leon.position_ids` says which
  positions to pass.
  """
  layout = layout_of(config)
  own: dict = {**vocab.sizes, "align_images": config.align_images}
  if vocab.template != "cm3leon":
    own["template"] = vocab.template
  if config.align_images:
    own["position_ids"] = POSITION_IDS
  return {
    "vocab_size": config.vocab_size,
    "pad_token_id": vocab.pad,
    "bos_token_id": vocab.eos,
    "eos_token_id": vocab.eos,
    "dtype": "float32",
    "cm3leon": own,
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "max_position_embeddings": config.max_positions,
    "architectures": [layout.architecture],
    "model_type": layout.model_type,
    **layout.describe(config),
  }
