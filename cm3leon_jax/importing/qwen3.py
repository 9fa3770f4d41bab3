"""Imports Qwen3ForCausalLM as the family `modern`, with larger token tables.

In the larger tables, the special tokens precede the source's ids, and the image codes follow them.
"""

# N query heads, G key and value heads, H head size, D width, F feed-forward, S ids of the source, V
# ids of the vocabulary.

from collections.abc import Callable
import dataclasses
import functools

from jaxtyping import Float
import numpy as np

from cm3leon_jax.config.model import ROPE_BASE
from cm3leon_jax.errors import UserError
from cm3leon_jax.importing.source import CONFIG, SourceCheckpoint
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights.tensor_files import Tensor

# Fields of config.json that must be absent or have this value.
REQUIRED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False}
HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Tables:
  """Says how token tables are extended to fit a vocabulary.

  Attributes:
    rows: number of rows of the source's tables.
    end: the source's end-of-text id, whose row is copied to `</s>`; None if there is no such id.
  """

  vocab: VocabLayout
  rows: int
  end: int | None = None

  def tensor(self, name: str, width: int, read: Callable[[], np.ndarray]) -> Tensor:
    """Makes the tensor of an extended table. `read` returns the source's table."""
    return Tensor(
      name, (self.vocab.size, width), "float32", lambda: extend(read(), self.vocab, self.end)
    )

  def describe(self) -> str:
    """Returns a sentence about the rows of an extended table."""
    vocab, start = (
      self.vocab,
      "" if self.end is None else f"</s> starts as the source's id {self.end}, ",
    )
    return (
      f"tables: the source's ids 0 to {self.rows - 1:,} become {vocab.num_special} to "
      f"{vocab.text_size - 1:,}; of {vocab.num_special} special tokens and {vocab.image_size:,} "
      f"image codes, {start}the others start as the mean of the source's {self.rows:,} rows."
    )


def extend(
  table: Float[np.ndarray, "S D"], vocab: VocabLayout, end: int | None
) -> Float[np.ndarray, "V D"]:
  """Extends a token table to a vocabulary. Ids that the source does not have get its mean row.

    table = [a b c], num_special = 6, two image codes, end = 2, m = (a + b + c) / 3
    result = [m c m m m m a b c m m]

  Equal rows become different in training, because tokens in different contexts get different
  gradients.

  Args:
    table: rows of the source's ids. Id i becomes `vocab.num_special` + i.
    vocab: layout with `text_size` = `num_special` + S.
    end: the source's end-of-text id, whose row is copied to `</s>`. If None, `</s>` gets the mean.
  """
  result = np.empty((vocab.size, table.shape[1]), table.dtype)
  result[:] = table.mean(0, dtype=np.float64)
  result[vocab.num_special : vocab.text_size] = table
  if end is not None:
    result[vocab.eos] = table[end]
  return result


def model_fields(source: SourceCheckpoint) -> dict:
  """Returns the fields of `config.model` that describe the decoder of a checkpoint.

  Raises:
    UserError: the family `modern` does not support the decoder.
  """
  path = source.folder / CONFIG
  source.require(REQUIRED)
  if any(kind != "full_attention" for kind in source.part("layer_types", list)):
    raise UserError(
      f"{path}: layer_types has kinds of attention other than 'full_attention', which cannot be "
      "imported."
    )
  width, heads = source.size("hidden_size", 4_096), source.size("num_attention_heads", 32)
  size = source.size("head_dim", 128)
  groups, base = source.key_heads(heads), source.rope_base()
  return {
    "family": "modern",
    "num_layers": source.size("num_hidden_layers", 32),
    "width": width,
    "num_heads": heads,
    "num_kv_heads": 0 if groups == heads else groups,
    "head_size": 0 if heads * size == width else size,
    "rope_base": 0.0 if base == ROPE_BASE else base,
    "mlp_width": source.size("intermediate_size", 22_016),
  }


def is_tied(source: SourceCheckpoint) -> bool:
  """Returns whether the input and output table of a checkpoint are the same array."""
  return bool(source.described.get("tie_word_embeddings", False))


def tensors(source: SourceCheckpoint, fields: dict, tables: Tables) -> list[Tensor]:
  """Returns the tensors of the imported model, in the layout of `cm3leon export`.

  Raises:
    UserError: the checkpoint has other tensors, nonzero biases, or two different output tables.
  """
  width = fields["width"]
  shapes = _layer_shapes(fields)
  names = {f"model.layers.{i}.{name}" for i in range(fields["num_layers"]) for name in shapes}
  biases = [name for name in source.tensors.names if f"{name.removesuffix('bias')}weight" in names]
  for name in biases:
    if largest := float(np.abs(source.tensors.read(name)).max(initial=0.0)):
      raise UserError(
        f"{source.folder}: tensor '{name}' has values up to {largest:.3g}, but the family `modern` "
        "has no biases, so this checkpoint cannot be imported exactly."
      )
  source.check_names({*names, *biases, EMBED, HEAD, "model.norm.weight"})
  read, head = source.tensors.read, EMBED if is_tied(source) else HEAD
  if head == EMBED and HEAD in source.tensors and not np.array_equal(read(HEAD), read(EMBED)):
    raise UserError(
      f"{source.folder}: tensor '{HEAD}' differs from '{EMBED}', but {CONFIG} has "
      "tie_word_embeddings: set tie_word_embeddings to false if the model has two tables."
    )
  for name in (EMBED, head):
    source.tensors.check_shape(name, (tables.rows, width))
  source.tensors.check_shape("model.norm.weight", (width,))
  result = [
    tables.tensor(EMBED, width, functools.partial(read, EMBED)),
    Tensor("model.norm.weight", (width,), "float32", functools.partial(read, "model.norm.weight")),
    tables.tensor(HEAD, width, functools.partial(read, head)),
  ]
  for i in range(fields["num_layers"]):
    for name, shape in shapes.items():
      name = f"model.layers.{i}.{name}"
      source.tensors.check_shape(name, shape)
      result.append(Tensor(name, shape, "float32", functools.partial(read, name)))
  return result


def _layer_shapes(fields: dict) -> dict[str, tuple[int, ...]]:
  """Maps the name of each of the source's tensors in a layer to its shape."""
  D, F, N = fields["width"], fields["mlp_width"], fields["num_heads"]
  G, H = fields["num_kv_heads"] or N, fields["head_size"] or D // N
  shapes: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj": (N * H, D),
    "self_attn.k_proj": (G * H, D),
    "self_attn.v_proj": (G * H, D),
    "self_attn.o_proj": (D, N * H),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
    "self_attn.q_norm": (H,),
    "self_attn.k_norm": (H,),
    "input_layernorm": (D,),
    "post_attention_layernorm": (D,),
  }
  return {f"{name}.weight": shape for name, shape in shapes.items()}
