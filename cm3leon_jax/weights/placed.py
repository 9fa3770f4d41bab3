"""Places the weights of a Hugging Face folder on the mesh: each process reads its devices' part."""

# K layers, D width, N heads, H head size, F feed-forward, V vocabulary, P positions.

from collections.abc import Callable
import functools

from flax import traverse_util
import jax
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.mesh import abstract
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.weights.layouts import OPT_OFFSET
from cm3leon_jax.weights.stored_tensors import StoredTensors

Index = tuple[slice, ...]
SCALES = {
  "norm1": "input_layernorm",
  "norm2": "post_attention_layernorm",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the names and shapes of the tensors of OPTForCausalLM or Qwen3ForCausalLM, [out, in].

  OPT's norms have no parameters here, and its products no biases.
  """
  K, D, F = config.num_layers, config.width, config.mlp_width
  A, V = config.num_heads * config.head_dim, config.vocab_size
  opt = config.family == "opt"
  prefix = "model.decoder" if opt else "model"
  table: dict[str, tuple[int, ...]] = {f"{prefix}.embed_tokens.weight": (V, D)}
  layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (A, D) for name in "qkv"}
  if opt:
    table[f"{prefix}.embed_positions.weight"] = (config.max_positions + OPT_OFFSET, D)
    layer |= {"self_attn.out_proj": (D, A), "fc1": (F, D), "fc2": (D, F)}
  else:
    table |= {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
    layer |= {"self_attn.o_proj": (D, A)}
    layer |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (D,))
    layer |= {f"self_attn.{name}_norm": (config.head_dim,) for name in "qk"}
  return table | {
    f"{prefix}.layers.{i}.{name}.weight": shape for i in range(K) for name, shape in layer.items()
  }


def check_shapes(tensors: StoredTensors, config: ModelConfig) -> None:
  """Raises UserError, with its name, if a tensor is absent or of another shape than `config`'s."""
  for name, shape in tensor_shapes(config).items():
    if (found := tensors.shape(name)) != shape:
      raise UserError(
        f"{tensors.folder}: tensor '{name}' is {list(found)}; by the config beside it, it must be "
        f"{list(shape)}."
      )


def types_of(config: ModelConfig) -> dict:
  """Returns the types of parameters on the current mesh."""
  types = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  return abstract(types, jax.sharding.get_mesh())


def load(tensors: StoredTensors, config: ModelConfig) -> dict:
  """Reads parameters onto the current mesh, fp32.

  Raises:
    UserError: a tensor is absent, of another shape than `config`'s, or has values that are not
      finite.
  """
  check_shapes(tensors, config)
  types = traverse_util.flatten_dict(types_of(config), sep=".")
  params = {}
  for name, kind in types.items():
    read = functools.partial(_read, tensors, config, name)
    params[name] = jax.make_array_from_callback(
      kind.shape, kind.sharding, functools.partial(_in_fp32, read, kind.shape)
    )
  return traverse_util.unflatten_dict(params, sep=".")


def _in_fp32(
  read: Callable[[Index], np.ndarray], shape: tuple[int, ...], index: Index
) -> np.ndarray:
  """Reads the part `index` of an array of this shape."""
  bounds = (part.indices(size) for part, size in zip(index, shape))
  return read(tuple(slice(start, stop) for start, stop, _ in bounds)).astype(np.float32, copy=False)


def _read(tensors: StoredTensors, config: ModelConfig, name: str, index: Index) -> np.ndarray:
  """Reads a part of the parameter with a dotted name."""
  prefix = "model.decoder" if config.family == "opt" else "model"
  if name.startswith("blocks."):
    layers, *rest = index
    read = functools.partial(_read_layer, tensors, config, name.split(".")[1], tuple(rest))
    return np.stack([read(f"{prefix}.layers.{i}") for i in range(layers.start, layers.stop)])
  if name == "positions":
    rows, columns = index
    rows = slice(rows.start + OPT_OFFSET, rows.stop + OPT_OFFSET)
    return tensors.read(f"{prefix}.embed_positions.weight", rows, columns)
  names = {"embed": f"{prefix}.embed_tokens", "head": "lm_head", "final_norm.scale": "model.norm"}
  return tensors.read(f"{names[name]}.weight", *index)


def _read_layer(
  tensors: StoredTensors, config: ModelConfig, kind: str, index: Index, layer: str
) -> np.ndarray:
  """Reads a part of a parameter of one layer."""
  opt, H = config.family == "opt", config.head_dim

  def heads(part: slice) -> slice:
    return slice(part.start * H, part.stop * H)

  def read(name: str, *part: slice) -> np.ndarray:
    return tensors.read(f"{layer}.{name}.weight", *part)

  if kind in SCALES:
    return read(SCALES[kind], *index)
  if kind == "qkv":
    which, D, N, _ = index
    names = [f"self_attn.{x}_proj" for x in "qkv"[which]]
    return np.stack([read(name, heads(N), D).T.reshape(-1, N.stop - N.start, H) for name in names])
  if kind == "out":
    N, _, D = index
    columns = read(f"self_attn.{'out' if opt else 'o'}_proj", D, heads(N))
    return columns.T.reshape(N.stop - N.start, H, -1)
  theirs = {"up": "fc1", "down": "fc2"} if opt else {x: f"mlp.{x}_proj" for x in (kind,)}
  ins, outs = index
  return read(theirs[kind], outs, ins).T
