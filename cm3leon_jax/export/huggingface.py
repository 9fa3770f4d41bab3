"""Exports to Hugging Face: `opt` as OPTForCausalLM, `modern` as Qwen3ForCausalLM.

Both load without remote code. A decoder with `model.align_images` has the same logits there at the
default positions if a sample has one image at most; after neighbors, or in a document of several
images, the engine needs `position_ids` (`positions.positions_of`). config.json says so, too.
"""

# K layers, D width, N heads, H head size, F feed-forward, V vocabulary, T tokens.

from collections.abc import Sequence
import dataclasses
import functools
import importlib.util
import math

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.export import int8, tensor_files
from cm3leon_jax.export.choices import Run
from cm3leon_jax.export.tensor_files import Tensor
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.mesh import batch_shards, shard
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ROPE_BASE, ModelConfig
from cm3leon_jax.positions import positions_of
from cm3leon_jax.tokenizers import text
from cm3leon_jax.training.checkpoints.stored import StoredParams, of_tree
from cm3leon_jax.vocab import VocabLayout

WEIGHTS = tensor_files.WEIGHTS
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

  def positions():
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

  def make():
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


def check(config: ModelConfig) -> None:
  """Raises UserError if the Hugging Face model lacks a part of the decoder."""
  if config.family == "opt" and config.query_key_norm:
    raise UserError(
      "config.model.query_key_norm is set: OPTForCausalLM has no such norm, so this decoder cannot "
      "be exported in the format hf."
    )
  if config.family == "opt" and config.head_dim * config.num_heads != config.width:
    raise UserError(
      f"config.model.head_size is {config.head_size}: the heads of OPTForCausalLM have the size "
      f"width / num_heads = {config.width} / {config.num_heads}: this decoder cannot be exported."
    )


def write(folder: epath.PathLike, run: Run) -> dict:
  """Writes a run for `transformers.AutoModelForCausalLM` and `AutoTokenizer`; see `export`."""
  settings, choice = run.settings, run.choice
  described = hf_config(settings.model, settings.vocab)
  tensors = tensors_of(run.params, settings.model, choice.dtype)
  count = sum(tensor.size for tensor in tensors)
  if choice.quantize:
    described["quantization_config"] = int8.CONFIG
    tensors = int8.quantized(tensors)
  tokenizer = run.workdir / "text_tokenizer"
  numbers = write_model(folder, described, tensors, settings.vocab, tokenizer, choice.dtype)
  return {**numbers, "parameters": count}


def tensors_of(params: StoredParams, config: ModelConfig, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of the Hugging Face model; raises UserError, see `check`."""
  check(config)
  return (opt_tensors if config.family == "opt" else qwen3_tensors)(params, dtype)


def export(
  folder: epath.PathLike,
  params: dict,
  config: ModelConfig,
  vocab: VocabLayout,
  tokenizer_folder: epath.PathLike | None,
  dtype: str = "float32",
) -> dict:
  """Writes files for `transformers.AutoModelForCausalLM` and `AutoTokenizer`, without torch.

  The weights are written last; those of an earlier export are deleted first: half of one has none.

  Args:
    folder: gets model.safetensors, config.json, generation_config.json and the tokenizer's files.
    params: parameters of the decoder, on any mesh.
    config: configuration of the decoder.
    vocab: layout of the token ids.
    tokenizer_folder: folder of the text tokenizer; None leaves it out.
    dtype: of the weights in the file, a key of `tensor_files.DTYPES`.

  Returns:
    {"architecture", "parameters", "bytes"}.

  Raises:
    UserError: the Hugging Face model lacks a part of the decoder.
  """
  tensors = tensors_of(of_tree(params), config, dtype)
  return write_model(folder, hf_config(config, vocab), tensors, vocab, tokenizer_folder, dtype)


def write_model(
  folder: epath.PathLike,
  described: dict,
  tensors: Sequence[Tensor],
  vocab: VocabLayout,
  tokenizer_folder: epath.PathLike | None,
  dtype: str,
  shard_bytes: int = tensor_files.SHARD_BYTES,
) -> dict:
  """Writes the files of a model of `transformers`; the result is that of `export`.

  Args:
    folder: see `export`.
    described: content of config.json, without the dtype.
    tensors: of the model.
    vocab: see `export`.
    tokenizer_folder: see `export`.
    dtype: that config.json names.
    shard_bytes: see `tensor_files.write`.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensor_files.remove(folder)
  write_json(folder / "config.json", {**described, "dtype": dtype})
  # A document ends with </s>, an infill (a caption, an answer) with <eoss>. config.json can name
  # only one of them, so this file must not be marked as derived from it ("_from_model_config").
  ids = {"pad_token_id": vocab.pad, "bos_token_id": vocab.eos}
  ids["eos_token_id"] = [vocab.eos, vocab.eoss]
  write_json(folder / "generation_config.json", ids)
  if tokenizer_folder is not None:
    text.copy_files(tokenizer_folder, folder)
  files = tensor_files.write(folder, tensors, shard_bytes)
  return {
    "architecture": described["architectures"][0],
    "parameters": sum(tensor.size for tensor in tensors),
    "bytes": sum((folder / name).stat().length for name in files),
  }


def can_compare(quantized: str = "") -> bool:
  """Returns whether what loads an export, also a quantized one, is installed (extra `[dev]`)."""
  more = ("compressed_tensors",) if quantized else ()
  return all(importlib.util.find_spec(name) for name in ("torch", "transformers", *more))


@functools.partial(jax.jit, static_argnums=0)
def causal_logits(config: ModelConfig, params: dict, tokens, positions):
  """Computes logits [T, V] fp32 of the ids and positions [T] of a sample, on the current mesh."""
  model = transformer.bind(config, params)
  tokens = shard(jnp.broadcast_to(tokens[None], (batch_shards(), tokens.size)), "batch", "length")
  positions = jnp.broadcast_to(positions[None], tokens.shape)
  hidden = model(tokens, shard(positions, "batch", "length"), jnp.ones_like(tokens))
  logits = transformer.logits(hidden, model.output_table())
  return shard(logits, None, "length", "vocab")[0]


def compare_logits(
  folder: epath.PathLike, params: dict, config: ModelConfig, samples: Sequence[np.ndarray]
) -> dict:
  """Compares the logits of the exported model and of this project's, both in fp32.

  Both get the positions of `positions_of`. Requires `can_compare()`.

  Args:
    folder: folder of `export`.
    params: parameters of the decoder, on the current mesh.
    config: configuration of the decoder.
    samples: token ids, [T] int32 each, T <= max_positions.

  Returns:
    {"max_difference", "max_logit", "samples", "tokens"}: the largest difference of two logits, and
    the largest absolute logit for comparison.
  """
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
  config = dataclasses.replace(config, dtype="float32", attention="plain")
  described = read_json(epath.Path(folder) / "config.json", {"cm3leon": dict})["cm3leon"]
  vocab = VocabLayout(**{name: described[name] for name in VOCAB_FIELDS})
  longest = max(len(s) for s in samples)
  difference, largest = 0.0, 0.0
  for sample in samples:
    positions = positions_of(sample, vocab, config.align_images)
    given = (torch.from_numpy(x.astype(np.int64))[None] for x in (sample, positions))
    with torch.no_grad():
      theirs = model(**dict(zip(("input_ids", "position_ids"), given))).logits[0].numpy()
    # Padded to one length for one program; a causal model ignores what follows.
    padded = (np.pad(x, (0, longest - len(sample))) for x in (sample, positions))
    ours = np.asarray(causal_logits(config, params, *padded))[: len(sample)]
    difference = max(difference, float(np.abs(ours - theirs).max()))
    largest = max(largest, float(np.abs(ours).max()))
  return {
    "max_difference": difference,
    "max_logit": largest,
    "samples": len(samples),
    "tokens": sum(map(len, samples)),
  }
