"""Counts the parameters of a decoder, and those that a run trains, on one device of a mesh."""

# D width, F feed-forward, V vocabulary.

from collections.abc import Mapping
import math

from cm3leon_jax.config.groups import Tuned
from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.mesh import FSDP
from cm3leon_jax.models import adapters


def trained(
  model: ModelConfig, tuned: Tuned | None, shape: Mapping[str, int]
) -> tuple[float, float, float, float]:
  """Counts the trained parameters on one device: all, those in layers, and those in token tables.

  The last number counts those of the model's arrays that are entirely trained, which have no frozen
  copy. `shape` contains the size of each mesh axis.
  """
  fsdp, tensor = math.prod(shape[axis] for axis in FSDP), shape["tensor"]
  layers, tables, positions = (n / fsdp for n in parameters(model))
  layers, tables = layers / tensor, tables / tensor
  if tuned is None:
    params = layers + tables + positions
    return params, layers, tables, params
  if isinstance(tuned, AdapterConfig):
    count = adapters.count(model, tuned, shape)
    return count, count, 0, 0
  firsts = [tuned.first_row(name) for name in ("embed", "head")]
  whole = firsts.count(0) * model.vocab_size * model.width / fsdp / tensor
  rows = sum((model.vocab_size - first) * model.width / fsdp for first in firsts if first)
  own = layers * len(tuned.layers(model)) / model.num_layers
  positions *= firsts[0] == 0
  kept = whole + positions + own * ("layers" in tuned.names)
  return own + whole + rows + positions, own, whole + rows, kept


def parameters(model: ModelConfig) -> tuple[int, int, int]:
  """Counts the parameters of the layers, of the token tables, and of the position table."""
  K, D, F, V = model.num_layers, model.width, model.mlp_width, model.vocab_size
  traits = model.traits
  heads = 2 * (model.num_heads + model.key_heads)  # Of queries and outputs, of keys and values.
  layer = D * heads * model.head_dim + (3 if traits.gated else 2) * D * F
  if traits.head_norms or model.query_key_norm:
    each = heads if traits.biased_head_norms else 2  # Scales and biases of all heads, or scales.
    layer += each * model.head_dim
  tables, positions = (1 if traits.tied else 2) * V * D, 0 if traits.rotary else model.max_positions
  if traits.scaled_norms:
    layer, tables = layer + 2 * D, tables + D
  return K * layer, tables, positions * D
