"""Converts adapters to the tensors of PEFT (https://github.com/huggingface/peft) and back."""

# K layers, R rank.

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
from cm3leon_jax.weights.layouts import QKV, layout_of
from cm3leon_jax.weights.stored import StoredParams
from cm3leon_jax.weights.tensor_files import Tensor

FILE = "adapter_model.safetensors"


def modules(model: ModelConfig) -> dict[str, str]:
  """Maps each matrix of a layer to its module in transformers, relative to the layer."""
  layout = layout_of(model)
  return {**dict(zip("qkv", QKV)), "out": layout.out, **layout.products}


def tensors_of(model: ModelConfig, params: StoredParams, dtype: str = "float32") -> list[Tensor]:
  """Lists the tensors of adapters: for each matrix, lora_A [R, in] and lora_B [out, R]."""
  tensors = []
  for name, layer, factor, theirs in _places(model, {n.split(".")[0] for n in params.shapes}):
    source = f"{name}.{factor}"
    tensors.append(_tensor(theirs, params, source, layer, dtype))
  return tensors


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
  path = epath.Path(folder) / FILE
  remedy = "run `cm3leon export --format=peft` again"
  if not path.exists():
    raise UserError(f"{path} does not exist: {remedy}.")
  check_foreign(path)
  try:
    found = safetensors.load(path.read_bytes())
  except SafetensorError as error:
    raise UserError(f"{path} is damaged ({error}): {remedy}.") from error
  found = {name: x.astype(np.float32) for name, x in found.items()}
  if bad := not_finite(found):
    raise UserError(f"{path}: tensor '{bad}' has values that are not finite: {remedy}.")
  types = jax.eval_shape(lambda: adapters.init(model, config, jax.random.key(0)))
  types = abstract(types, jax.sharding.get_mesh())
  layers: dict[tuple[str, str], list[np.ndarray]] = {}
  for name, _, factor, theirs in _places(model, set(types)):
    shape = types[name][factor].shape[1:]
    if theirs not in found or found[theirs].size != np.prod(shape):
      raise UserError(f"{path}: tensor '{theirs}' is absent or has another shape: {remedy}.")
    layers.setdefault((name, factor), []).append(found[theirs].T.reshape(shape))

  def place(name: str, factor: str) -> jax.Array:
    whole, kind = np.stack(layers[name, factor]), types[name][factor]
    return jax.make_array_from_callback(whole.shape, kind.sharding, lambda index: whole[index])

  return {name: {factor: place(name, factor) for factor in "ab"} for name in types}
