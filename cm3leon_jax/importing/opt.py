"""OPTForCausalLM without biases as the family `opt`, whose norms have no parameters."""

# D width, F feed-forward, P positions.

import functools

import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.importing.source import CONFIG, SourceCheckpoint
from cm3leon_jax.importing.tables import Tables
from cm3leon_jax.weights.layouts import LAYOUTS, OPT_ACTIVATIONS
from cm3leon_jax.weights.tensor_files import Tensor

ALLOWED = {
  "do_layer_norm_before": (True, None),
  "_remove_final_layer_norm": (False, None),
  "activation_function": (*OPT_ACTIVATIONS.values(), None),
  "tie_word_embeddings": (True, None),
}
EMBED, POSITIONS = "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"
HEAD, FINAL_NORM = "lm_head.weight", "model.decoder.final_layer_norm"
FIRST_POSITION = LAYOUTS["opt"].first_position
# A product of a layer -> the norm before it.
NORM_OF = {
  "self_attn.q_proj": "self_attn_layer_norm",
  "self_attn.k_proj": "self_attn_layer_norm",
  "self_attn.v_proj": "self_attn_layer_norm",
  "self_attn.out_proj": "",
  "fc1": "final_layer_norm",
  "fc2": "",
}


def model_fields(source: SourceCheckpoint) -> dict:
  """Returns the fields of `config.model` that a checkpoint needs.

  Raises:
    UserError: its decoder is not that of the family.
  """
  source.require(ALLOWED)
  width = source.size("hidden_size", 768)
  projected = source.size("word_embed_proj_dim", width)
  if projected != width:
    raise UserError(
      f"{source.folder / CONFIG}: word_embed_proj_dim is {projected}, and hidden_size {width}; the "
      "family `opt` has no projection between its tables and its layers, so they must be equal."
    )
  names = {theirs: ours for ours, theirs in OPT_ACTIVATIONS.items()}
  return {
    "family": "opt",
    "activation": names[source.described.get("activation_function") or "relu"],
    "num_layers": source.size("num_hidden_layers", 12),
    "width": width,
    "num_heads": source.size("num_attention_heads", 12),
    "head_size": 0,
    "mlp_width": source.size("ffn_dim", 3_072),
    "max_positions": source.size("max_position_embeddings", 2_048),
    "query_key_norm": False,
  }


def tensors(source: SourceCheckpoint, fields: dict, tables: Tables) -> list[Tensor]:
  """Returns the tensors of the imported model, in the layout of `cm3leon export`.

  The scale of a norm is folded into the products after it.

  Raises:
    UserError: a part of the checkpoint has no place in the family.
  """
  D, F, P = fields["width"], fields["mlp_width"], fields["max_positions"]
  shapes = dict.fromkeys(NORM_OF, (D, D)) | {"fc1": (F, D), "fc2": (D, F)}
  layers = [f"model.decoder.layers.{i}" for i in range(fields["num_layers"])]
  products = {f"{layer}.{name}" for layer in layers for name in NORM_OF}
  norms = {f"{layer}.{norm}" for layer in layers for norm in NORM_OF.values() if norm}
  biases = [f"{name}.bias" for name in sorted(products | norms) + [FINAL_NORM]]
  biases = [name for name in biases if name in source.tensors]
  for name in biases:
    source.check_zero(name, "the family `opt` has no biases")
  scales = [f"{name}.weight" for name in (*norms, FINAL_NORM)]
  weights = [f"{name}.weight" for name in products]
  source.check_names({*weights, *scales, *biases, EMBED, POSITIONS, HEAD})
  _check_head(source)
  for name, shape in ((EMBED, (tables.rows, D)), (POSITIONS, (P + FIRST_POSITION, D))):
    source.check_shape(name, shape)
  read = source.tensors.read
  result = [
    tables.tensor(EMBED, D, functools.partial(read, EMBED)),
    Tensor(POSITIONS, (P + FIRST_POSITION, D), "float32", functools.partial(read, POSITIONS)),
  ]
  for layer in layers:
    for name, norm in NORM_OF.items():
      source.check_shape(f"{layer}.{name}.weight", shapes[name])
      scale = f"{layer}.{norm}.weight"
      folded = scale if norm and scale in source.tensors else ""
      make = functools.partial(_folded, source, f"{layer}.{name}.weight", folded)
      result.append(Tensor(f"{layer}.{name}.weight", shapes[name], "float32", make))
  return result


def notes(source: SourceCheckpoint, _: dict) -> list[str]:
  """Says what the import of a checkpoint changes beside its vocabulary."""
  norms = [n for n in source.tensors.names if n.endswith("_layer_norm.weight") and ".layers." in n]
  count = sum(bool((source.tensors.read(name) != 1).any()) for name in norms)
  if not count:
    return []
  return [f"norms: the scales of {count} are folded into the products after them: exact."]


def _folded(source: SourceCheckpoint, name: str, scale: str) -> np.ndarray:
  """Reads a matrix [out, in], its columns times the scale of the norm before it."""
  matrix = source.tensors.read(name)
  return matrix * source.tensors.read(scale)[None] if scale else matrix


def _check_head(source: SourceCheckpoint) -> None:
  """Raises UserError if the table after the final norm is not the input table."""
  scale = f"{FINAL_NORM}.weight"
  if scale in source.tensors:
    x = source.tensors.read(scale)
    if (x != 1).any():
      raise UserError(
        f"{source.folder}: tensor '{scale}' has values from {x.min():.3g} to {x.max():.3g}; only 1 "
        "can be imported exactly: the output table, into which it would be folded, is the input "
        "table, too."
      )
  if HEAD in source.tensors and not source.are_equal(HEAD, EMBED):
    raise UserError(
      f"{source.folder}: tensor '{HEAD}' is not '{EMBED}'; the family `opt` has one table for both."
    )
