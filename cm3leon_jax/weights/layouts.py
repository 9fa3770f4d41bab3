"""The layouts of OPTForCausalLM and Qwen3ForCausalLM: their tensors and config.json, both ways."""

import functools
import math

import numpy as np

from cm3leon_jax.models.config import ROPE_BASE, ModelConfig
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights.stored import StoredParams
from cm3leon_jax.weights.tensor_files import Tensor

VOCAB_FIELDS = ("num_special", "text_size", "image_size")
POSITION_IDS = (
  "This decoder counts positions from the images. A sample with at most one image needs no "
  "position_ids. After retrieved documents, or with several images, pass them: split the sample "
  "after every <break> that follows an image code; in each part, position 0 is the token after the "
  "last <break> or </s> before the first image code, and the others count from it, down before it "
  "and up after it; a part without image codes counts on from the part before it. If an engine "
  "takes no negative positions, add one number to all positions of the sample: attention depends "
  "on their differences alone."
)
QWEN3_NORMS = (
  ("q_norm", "self_attn.q_norm"),
  ("k_norm", "self_attn.k_norm"),
  ("norm1", "input_layernorm"),
  ("norm2", "post_attention_layernorm"),
)
# config.model.activation -> its name in transformers.
OPT_ACTIVATIONS = {"": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
OPT_OFFSET = 2  # OPT stores position p in row p + 2 and never reads the rows before.


def opt_tensors(params: StoredParams, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of OPTForCausalLM, weights [out, in]; the head is tied to the embeddings."""
  table = params.shapes["positions"]

  def positions() -> np.ndarray:
    return np.pad(params.read("positions"), ((OPT_OFFSET, 0), (0, 0)))

  tensors = [
    as_stored("model.decoder.embed_tokens.weight", params, "embed", dtype=dtype),
    Tensor(
      "model.decoder.embed_positions.weight", (table[0] + OPT_OFFSET, table[1]), dtype, positions
    ),
  ]
  for i in range(params.shapes["blocks.up"][0]):
    layer = f"model.decoder.layers.{i}"
    tensors += _attention(f"{layer}.self_attn", params, i, "out_proj", dtype)
    tensors += [
      transposed(f"{layer}.fc1.weight", params, "blocks.up", i, dtype=dtype),
      transposed(f"{layer}.fc2.weight", params, "blocks.down", i, dtype=dtype),
    ]
  return tensors


def qwen3_tensors(params: StoredParams, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of Qwen3ForCausalLM, weights [out, in]."""
  tensors = [
    as_stored("model.embed_tokens.weight", params, "embed", dtype=dtype),
    as_stored("model.norm.weight", params, "final_norm.scale", dtype=dtype),
    as_stored("lm_head.weight", params, "head", dtype=dtype),
  ]
  for i in range(params.shapes["blocks.up"][0]):
    layer = f"model.layers.{i}"
    tensors += _attention(f"{layer}.self_attn", params, i, "o_proj", dtype)
    tensors += [
      as_stored(f"{layer}.{theirs}.weight", params, f"blocks.{ours}.scale", i, dtype=dtype)
      for ours, theirs in QWEN3_NORMS
    ]
    tensors += [
      transposed(f"{layer}.mlp.{name}_proj.weight", params, f"blocks.{name}", i, dtype=dtype)
      for name in ("gate", "up", "down")
    ]
  return tensors


def as_stored(name: str, params: StoredParams, source: str, *index: int, dtype: str) -> Tensor:
  """Returns a tensor that is a stored array, or its part at an index."""
  shape = params.shapes[source][len(index) :]
  return Tensor(name, shape, dtype, functools.partial(params.read, source, *index))


def transposed(
  name: str, params: StoredParams, source: str, *index: int, dtype: str, axes_in: int = 1
) -> Tensor:
  """Returns a stored matrix as [out, in]; its first `axes_in` axes are the input."""
  shape = params.shapes[source][len(index) :]
  rows, columns = math.prod(shape[:axes_in]), math.prod(shape[axes_in:])

  def make() -> np.ndarray:
    return params.read(source, *index).reshape(rows, columns).T

  return Tensor(name, (columns, rows), dtype, make)


def _attention(
  prefix: str, params: StoredParams, i: int, out_name: str, dtype: str
) -> list[Tensor]:
  tensors = [
    transposed(f"{prefix}.{name}_proj.weight", params, "blocks.qkv", i, j, dtype=dtype)
    for j, name in enumerate("qkv")
  ]
  out = f"{prefix}.{out_name}.weight"
  return [*tensors, transposed(out, params, "blocks.out", i, dtype=dtype, axes_in=2)]


def config_of(described: dict) -> dict[str, dict]:
  """Returns the fields of the sections `model` and `vocab` that `hf_config` described.

  Raises:
    KeyError: `hf_config` did not write it.
  """
  if described["model_type"] not in ("opt", "qwen3"):
    raise KeyError("model_type 'opt' or 'qwen3'")
  opt = described["model_type"] == "opt"
  model = {
    "family": "opt" if opt else "modern",
    "vocab_size": described["vocab_size"],
    "num_layers": described["num_hidden_layers"],
    "width": described["hidden_size"],
    "num_heads": described["num_attention_heads"],
    "mlp_width": described["ffn_dim" if opt else "intermediate_size"],
    "max_positions": described["max_position_embeddings"],
    "align_images": described["cm3leon"].get("align_images", False),
  }
  if opt:  # A decoder with query-key norms or another head size is not exported.
    names = {theirs: ours for ours, theirs in OPT_ACTIVATIONS.items()}
    model["activation"] = names[described["activation_function"]]
    model |= {"query_key_norm": False, "head_size": 0}
  else:
    size, base = described["head_dim"], float(described["rope_theta"])
    usual = size * model["num_heads"] == model["width"]
    model |= {"head_size": 0 if usual else size, "rope_base": 0.0 if base == ROPE_BASE else base}
  return {"model": model, "vocab": {name: described["cm3leon"][name] for name in VOCAB_FIELDS}}


def ids_config(config: ModelConfig, vocab: VocabLayout) -> dict:
  """Returns the fields of config.json that say what the ids are; of every model of transformers."""
  own = {name: getattr(vocab, name) for name in VOCAB_FIELDS}
  own["align_images"] = config.align_images
  if config.align_images:
    own["position_ids"] = POSITION_IDS
  return {
    "vocab_size": config.vocab_size,
    "pad_token_id": vocab.pad,
    "bos_token_id": vocab.eos,
    "eos_token_id": vocab.eos,
    "dtype": "float32",
    "cm3leon": own,
  }


def hf_config(config: ModelConfig, vocab: VocabLayout) -> dict:
  """Returns the content of config.json. Image code c is token id `cm3leon.text_size` + c.

  `cm3leon.position_ids` says what another engine must do, if its own positions are not enough.
  """
  common = {
    **ids_config(config, vocab),
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "max_position_embeddings": config.max_positions,
  }
  if config.family == "opt":
    return common | {
      "architectures": ["OPTForCausalLM"],
      "model_type": "opt",
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
  return common | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "intermediate_size": config.mlp_width,
    "num_key_value_heads": config.num_heads,
    "head_dim": config.head_dim,
    "rms_norm_eps": 1e-6,
    "rope_theta": config.rotary_base,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
  }
