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
from typing import Literal

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json, replacing, write_json
from cm3leon_jax.mesh import batch_shards, shard
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ROPE_BASE, ModelConfig
from cm3leon_jax.positions import positions_of
from cm3leon_jax.vocab import VocabLayout

WEIGHTS = "model.safetensors"
VOCAB_FIELDS = ("num_special", "text_size", "image_size")
POSITION_IDS = (
  "This decoder counts positions from the images (align_images). A sample with one image at most "
  "needs nothing. After retrieved documents, or with several images, pass as position_ids the "
  "result of cm3leon_jax.positions.positions_of(tokens, vocab, align_images=True): the first code "
  "of every image has position 0, the tokens before it count backwards. A constant may be added."
)
OPT_OFFSET = 2  # OPT stores position p in row p + 2 and never reads the rows before.


def opt_tensors(params: dict) -> dict[str, np.ndarray]:
  """Converts parameters of the `opt` family to OPTForCausalLM's names, weights [out, in] fp32.

  The head is tied to the embedding table.
  """
  positions = params["positions"]
  tensors = {
    "model.decoder.embed_tokens.weight": params["embed"],
    "model.decoder.embed_positions.weight": np.pad(positions, ((OPT_OFFSET, 0), (0, 0))),
  }
  blocks = params["blocks"]
  for i in range(len(blocks["up"])):
    layer = f"model.decoder.layers.{i}"
    tensors |= _attention(f"{layer}.self_attn", blocks, i, "out_proj")
    tensors |= {
      f"{layer}.fc1.weight": blocks["up"][i].T,
      f"{layer}.fc2.weight": blocks["down"][i].T,
    }
  return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def qwen3_tensors(params: dict) -> dict[str, np.ndarray]:
  """Converts parameters of the `modern` family to Qwen3ForCausalLM's names, [out, in] fp32."""
  tensors = {
    "model.embed_tokens.weight": params["embed"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": params["head"],
  }
  blocks = params["blocks"]
  for i in range(len(blocks["up"])):
    layer = f"model.layers.{i}"
    tensors |= _attention(f"{layer}.self_attn", blocks, i, "o_proj")
    tensors |= {
      f"{layer}.self_attn.q_norm.weight": blocks["q_norm"]["scale"][i],
      f"{layer}.self_attn.k_norm.weight": blocks["k_norm"]["scale"][i],
      f"{layer}.input_layernorm.weight": blocks["norm1"]["scale"][i],
      f"{layer}.post_attention_layernorm.weight": blocks["norm2"]["scale"][i],
      f"{layer}.mlp.gate_proj.weight": blocks["gate"][i].T,
      f"{layer}.mlp.up_proj.weight": blocks["up"][i].T,
      f"{layer}.mlp.down_proj.weight": blocks["down"][i].T,
    }
  return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def _attention(prefix: str, blocks: dict, i: int, out_name: str) -> dict[str, np.ndarray]:
  width = blocks["qkv"].shape[2]
  qkv = blocks["qkv"][i].reshape(3, width, -1)
  names = [f"{prefix}.{name}_proj.weight" for name in "qkv"]
  return {
    **{name: w.T for name, w in zip(names, qkv)},
    f"{prefix}.{out_name}.weight": blocks["out"][i].reshape(-1, width).T,
  }


def params_of(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict:
  """Converts what `opt_tensors` or `qwen3_tensors` returned back to parameters, fp32.

  Raises:
    KeyError: a tensor is missing.
  """
  K, D, N, H = config.num_layers, config.width, config.num_heads, config.head_dim
  opt = config.family == "opt"
  prefix = "model.decoder" if opt else "model"

  def layers(name):
    return np.stack([tensors[f"{prefix}.layers.{i}.{name}.weight"] for i in range(K)])

  def transposed(name):
    return layers(name).swapaxes(1, 2)

  qkv = [transposed(f"self_attn.{name}_proj").reshape(K, D, N, H) for name in "qkv"]
  out = transposed(f"self_attn.{'out' if opt else 'o'}_proj").reshape(K, N, H, D)
  blocks = {"qkv": np.stack(qkv, axis=1), "out": out}
  params = {"embed": tensors[f"{prefix}.embed_tokens.weight"], "blocks": blocks}
  if opt:
    blocks |= {"up": transposed("fc1"), "down": transposed("fc2")}
    params["positions"] = tensors[f"{prefix}.embed_positions.weight"][OPT_OFFSET:]
  else:
    blocks |= {name: transposed(f"mlp.{name}_proj") for name in ("gate", "up", "down")}
    blocks |= {
      ours: {"scale": layers(theirs)}
      for ours, theirs in (
        ("q_norm", "self_attn.q_norm"),
        ("k_norm", "self_attn.k_norm"),
        ("norm1", "input_layernorm"),
        ("norm2", "post_attention_layernorm"),
      )
    }
    params["head"] = tensors["lm_head.weight"]
    params["final_norm"] = {"scale": tensors["model.norm.weight"]}
  return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def config_of(described: dict) -> dict[str, dict]:
  """Returns the fields of the sections `model` and `vocab` that `hf_config` described.

  Raises:
    KeyError: `hf_config` did not write it.
  """
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
  if opt:  # A decoder with these norms or another head size is not exported.
    model |= {"query_key_norm": False, "head_size": 0}
  else:
    size, base = described["head_dim"], float(described["rope_theta"])
    usual = size * model["num_heads"] == model["width"]
    model |= {"head_size": 0 if usual else size, "rope_base": 0.0 if base == ROPE_BASE else base}
  return {"model": model, "vocab": {name: described["cm3leon"][name] for name in VOCAB_FIELDS}}


def hf_config(config: ModelConfig, vocab: VocabLayout) -> dict:
  """Returns the content of config.json. Image code c is token id `cm3leon.text_size` + c.

  `cm3leon.position_ids` says what another engine must do, if its own positions are not enough.
  """
  own = {name: getattr(vocab, name) for name in VOCAB_FIELDS}
  own["align_images"] = config.align_images
  if config.align_images:
    own["position_ids"] = POSITION_IDS
  common = {
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "max_position_embeddings": config.max_positions,
    "pad_token_id": vocab.pad,
    "bos_token_id": vocab.eos,
    "eos_token_id": vocab.eos,
    "dtype": "float32",
    "cm3leon": own,
  }
  if config.family == "opt":
    return common | {
      "architectures": ["OPTForCausalLM"],
      "model_type": "opt",
      "activation_function": "relu",
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


def export(
  folder: epath.PathLike,
  params: dict,
  config: ModelConfig,
  vocab: VocabLayout,
  tokenizer_folder: epath.PathLike | None,
  dtype: Literal["float32", "float16"] = "float32",
) -> dict:
  """Writes files for `transformers.AutoModelForCausalLM` and `AutoTokenizer`, without torch.

  The weights are written last; those of an earlier export are deleted first, so that half an export
  has none.

  Args:
    folder: gets model.safetensors, config.json, generation_config.json and the tokenizer's files.
    params: parameters of the decoder, on any mesh.
    config: configuration of the decoder.
    vocab: layout of the token ids.
    tokenizer_folder: folder of the text tokenizer; None leaves it out.
    dtype: of the weights in the file.

  Returns:
    {"architecture", "parameters", "bytes"}.

  Raises:
    UserError: the Hugging Face model lacks a part of the decoder.
  """
  if config.family == "opt" and config.query_key_norm:
    raise UserError(
      "config.model.query_key_norm is set: OPTForCausalLM has no such norm, so this decoder cannot "
      "be exported."
    )
  if config.family == "opt" and config.head_dim * config.num_heads != config.width:
    raise UserError(
      f"config.model.head_size is {config.head_size}: the heads of OPTForCausalLM have the size "
      f"width / num_heads = {config.width} / {config.num_heads}: this decoder cannot be exported."
    )
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / WEIGHTS).unlink(missing_ok=True)
  described = {**hf_config(config, vocab), "dtype": dtype}
  write_json(folder / "config.json", described)
  # A document ends with </s>, an infill (a caption, an answer) with <eoss>. config.json can name
  # only one of them, so this file must not be marked as derived from it ("_from_model_config").
  ids = {"pad_token_id": vocab.pad, "bos_token_id": vocab.eos}
  ids["eos_token_id"] = [vocab.eos, vocab.eoss]
  write_json(folder / "generation_config.json", ids)
  if tokenizer_folder is not None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
      (folder / name).write_text((epath.Path(tokenizer_folder) / name).read_text())
  host = jax.tree.map(lambda x: np.asarray(x, np.float32), jax.device_get(params))
  tensors = opt_tensors(host) if config.family == "opt" else qwen3_tensors(host)
  tensors = {name: x.astype(dtype) for name, x in tensors.items()}
  with replacing(folder / WEIGHTS) as file:
    file.write(safetensors_numpy.save(tensors, {"format": "pt"}))
  return {
    "architecture": described["architectures"][0],
    "parameters": sum(x.size for x in tensors.values()),
    "bytes": (folder / WEIGHTS).stat().length,
  }


def can_compare() -> bool:
  """Returns whether torch and transformers are installed (the `[dev]` extra)."""
  return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


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
