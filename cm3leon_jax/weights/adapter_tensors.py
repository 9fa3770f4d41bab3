"""Converts adapters to the tensors of PEFT (https://github.com/huggingface/peft) and back."""

# K layers, R rank, D width, T trained tokens.

from collections.abc import Iterator

from etils import epath
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import check_foreign
from cm3leon_jax.mesh import abstract
from cm3leon_jax.models import adapters
from cm3leon_jax.models.config import AdapterConfig, ModelConfig
from cm3leon_jax.parameters import not_finite
from cm3leon_jax.weights.layouts import QKV, as_stored, layout_of
from cm3leon_jax.weights.stored import StoredParams
from cm3leon_jax.weights.tensor_files import Tensor

FILE = "adapter_model.safetensors"
# Trained rows of the token tables, which are added to the base. PEFT reads their sums from FILE.
ROWS = "token_rows.safetensors"
_REMEDY = "run `cm3leon export --format=peft` again"
SUMS = "sums"  # Key of these sums, [T, D], among the adapters to export.


def modules(model: ModelConfig) -> dict[str, str]:
  """Maps each matrix of a layer to its module in transformers, relative to the layer."""
  layout = layout_of(model)
  return {**dict(zip("qkv", QKV)), "out": layout.out, **layout.products}


def tensors_of(model: ModelConfig, params: StoredParams, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of adapters: for each matrix, lora_A [R, in] and lora_B [out, R].

  For each token table with trained rows, trainable_tokens_delta [T, D] follows. In spite of its
  name, PEFT replaces rows of the table by it.
  """
  tensors = []
  for name, layer, factor, theirs in _places(model, {n.split(".")[0] for n in params.shapes}):
    source = f"{name}.{factor}"
    tensors.append(_tensor(theirs, params, source, layer, dtype))
  for name in adapters.TABLES:
    if name in params.shapes:
      path = f"base_model.model.{layout_of(model).tables[name]}.token_adapter"
      source = f"{SUMS}.{name}"
      tensors.append(as_stored(f"{path}.trainable_tokens_delta", params, source, dtype=dtype))
  return tensors


def rows_of(params: StoredParams, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of the file `ROWS`: "embed" and "head", [T, D]."""
  names = (name for name in adapters.TABLES if name in params.shapes)
  return [as_stored(name, params, name, dtype=dtype) for name in names]


def _places(model: ModelConfig, names: set[str]) -> Iterator[tuple[str, int, str, str]]:
  """Yields (matrix, layer, "a" or "b", name of the tensor) for the adapters of matrices."""
  for layer in range(model.num_layers):
    for name, module in modules(model).items():
      for factor in "ab" if name in names else "":
        path = f"base_model.model.{layout_of(model).prefix}.layers.{layer}.{module}"
        yield name, layer, factor, f"{path}.lora_{factor.upper()}.weight"


def _tensor(theirs: str, params: StoredParams, source: str, layer: int, dtype: str) -> Tensor:
  shape = params.shapes[source][1:]
  rank = shape[-1] if source.endswith(".a") else shape[0]
  rows = -1 if source.endswith(".a") else rank
  size = int(np.prod(shape)) // rank

  def make() -> np.ndarray:
    return params.read(source, layer).reshape(rows, rank if rows == -1 else -1).T

  return Tensor(theirs, (rank, size) if rows == -1 else (size, rank), dtype, make)


def load(folder: epath.PathLike, model: ModelConfig, config: AdapterConfig) -> dict:
  """Loads the adapters of an export onto the current mesh, in fp32.

  Raises:
    UserError: the file is absent or damaged, or does not match the config.
  """
  found = _read(epath.Path(folder) / FILE)
  if config.tokens:
    found |= _read(epath.Path(folder) / ROWS)
  types = jax.eval_shape(lambda: adapters.init(model, config, jax.random.key(0)))
  types = abstract(types, jax.sharding.get_mesh())

  def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in found or found[name].size != np.prod(shape):
      path = epath.Path(folder) / (ROWS if name in types else FILE)
      raise UserError(f"{path}: tensor '{name}' is absent or has another shape: {_REMEDY}.")
    return found[name]

  whole: dict = {name: tensor(name, types[name].shape) for name in adapters.TABLES if name in types}
  for name, _, factor, theirs in _places(model, set(types)):
    shape = types[name][factor].shape[1:]
    layers = whole.setdefault(name, {"a": [], "b": []})[factor]
    layers.append(tensor(theirs, shape).T.reshape(shape))

  def place(kind: jax.ShapeDtypeStruct, x: np.ndarray | list[np.ndarray]) -> jax.Array:
    stacked = np.asarray(x)
    return jax.make_array_from_callback(kind.shape, kind.sharding, lambda index: stacked[index])

  return jax.tree.map(place, types, whole)


def _read(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a file as fp32. Raises UserError if it is absent or damaged."""
  if not path.exists():
    raise UserError(f"{path} does not exist: {_REMEDY}.")
  check_foreign(path)
  try:
    found = safetensors.load(path.read_bytes())
  except SafetensorError as error:
    raise UserError(f"{path} is damaged ({error}): {_REMEDY}.") from error
  found = {name: x.astype(np.float32) for name, x in found.items()}
  if bad := not_finite(found):
    raise UserError(f"{path}: tensor '{bad}' has values that are not finite: {_REMEDY}.")
  return found
