"""The format `gpt2`: GPT2LMHeadModel, the route to llama.cpp.

GPT-2 is the family `opt` with biases, which are 0 here, and norms with parameters, which are 1 and
0. Its activation is the GELU by tanh, whatever config.json says: llama.cpp reads no other. So only
a decoder with `model.activation="gelu_tanh"` has the same logits there.
"""

# D width, F feed-forward, N positions.

from collections.abc import Callable
from typing import TypeAlias

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.export import huggingface
from cm3leon_jax.export.choices import TrainedRun
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import layouts
from cm3leon_jax.weights.stored import StoredParams
from cm3leon_jax.weights.tensor_files import Tensor

Matrix: TypeAlias = tuple[tuple[int, int], Callable[[], np.ndarray]]  # See `_matrix`.


def check(config: ModelConfig) -> None:
  """Raises UserError if GPT-2 lacks a part of the decoder."""
  if config.family != "opt":
    raise UserError(
      f"config.model.family is '{config.family}', and --format=gpt2 needs 'opt': GPT-2 has no "
      "rotary positions, RMSNorm or SwiGLU; use --format=hf."
    )
  if config.query_key_norm:
    raise UserError(
      "config.model.query_key_norm is set: GPT2LMHeadModel has no such norm, so this decoder "
      "cannot be exported in the format gpt2."
    )
  if config.head_dim * config.num_heads != config.width:
    raise UserError(
      f"config.model.head_size is {config.head_size}: the heads of GPT2LMHeadModel have the size "
      f"width / num_heads = {config.width} / {config.num_heads}: this decoder cannot be exported."
    )
  if config.activation != "gelu_tanh":
    raise UserError(
      f"config.model.activation is '{config.activation}'{'' if config.activation else ' (ReLU)'}, "
      "and --format=gpt2 needs 'gelu_tanh', the activation of GPT-2: use --format=hf, or train a "
      "decoder with it."
    )


def gpt2_config(config: ModelConfig, vocab: VocabLayout) -> dict:
  """Returns the content of config.json."""
  return layouts.ids_config(config, vocab) | {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_positions": config.max_positions,
    "n_ctx": config.max_positions,  # Read by the converter of llama.cpp.
    "n_embd": config.width,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "n_inner": config.mlp_width,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "tie_word_embeddings": True,
  }


def gpt2_tensors(params: StoredParams, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of GPT2LMHeadModel, matrices [in, out]; the head is tied."""
  width = params.shapes["embed"][1]
  tensors = [
    layouts.as_stored("transformer.wte.weight", params, "embed", dtype=dtype),
    layouts.as_stored("transformer.wpe.weight", params, "positions", dtype=dtype),
    *_norm("transformer.ln_f", width, dtype),
  ]
  for i in range(params.shapes["blocks.up"][0]):
    layer = f"transformer.h.{i}"
    tensors += [
      *_norm(f"{layer}.ln_1", width, dtype),
      *_norm(f"{layer}.ln_2", width, dtype),
      *_linear(f"{layer}.attn.c_attn", _qkv(params, i), dtype),
      *_linear(f"{layer}.attn.c_proj", _matrix(params, "blocks.out", i, width), dtype),
      *_linear(f"{layer}.mlp.c_fc", _matrix(params, "blocks.up", i, width), dtype),
      *_linear(f"{layer}.mlp.c_proj", _matrix(params, "blocks.down", i), dtype),
    ]
  return tensors


def _matrix(params: StoredParams, name: str, i: int, rows: int | None = None) -> Matrix:
  """Returns the shape of a matrix of layer `i` as [rows, columns], and a function that reads it."""
  stored = params.shapes[name][1:]
  shape = (rows or stored[0], int(np.prod(stored)) // (rows or stored[0]))
  return shape, lambda: params.read(name, i).reshape(shape)


def _qkv(params: StoredParams, i: int) -> Matrix:
  """Like `_matrix` for queries, keys and values beside each other, [D, 3 D]."""
  width = params.shapes["embed"][1]

  def read() -> np.ndarray:
    return np.concatenate([params.read("blocks.qkv", i, j).reshape(width, -1) for j in range(3)], 1)

  return (width, 3 * width), read


def _linear(name: str, matrix: Matrix, dtype: str) -> list[Tensor]:
  shape, read = matrix
  return [
    Tensor(f"{name}.weight", shape, dtype, read),
    _constant(f"{name}.bias", shape[1], 0, dtype),
  ]


def _norm(name: str, width: int, dtype: str) -> list[Tensor]:
  return [_constant(f"{name}.weight", width, 1, dtype), _constant(f"{name}.bias", width, 0, dtype)]


def _constant(name: str, size: int, value: float, dtype: str) -> Tensor:
  return Tensor(name, (size,), dtype, lambda: np.full(size, value, np.float32))


def write(folder: epath.PathLike, run: TrainedRun) -> dict:
  """Writes a run for `transformers` and the converter of llama.cpp; see `huggingface.write_model`.

  Raises:
    UserError: see `check`.
  """
  settings, dtype = run.settings, run.choice.dtype
  check(settings.model)
  described = gpt2_config(settings.model, settings.vocab)
  tensors = gpt2_tensors(run.params, dtype)
  tokenizer = run.text_tokenizer
  return huggingface.write_model(folder, described, tensors, settings.vocab, tokenizer, dtype)
