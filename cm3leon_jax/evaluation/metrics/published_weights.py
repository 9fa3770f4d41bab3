"""Reads published weights of feature extractors from safetensors files, and checks them.

Unlike a pickle of torch, such a file cannot run code.
"""

from collections.abc import Mapping
import hashlib
import json

from etils import epath
import numpy as np
import safetensors
import safetensors.numpy

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import check_foreign
from cm3leon_jax.weights.stored_tensors import not_finite


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
  """Reads all tensors of a safetensors file.

  Raises:
    UserError: the file is absent or damaged, or a tensor is not finite.
  """
  path = epath.Path(path)
  if not path.exists() or path.is_dir():
    raise UserError(f"{path} is not a file; it must be a safetensors file with the weights.")
  check_foreign(path)
  try:
    tensors = safetensors.numpy.load(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise UserError(
      f"{path} is not a safetensors file, or it is damaged ({error}); download or convert it again."
    ) from error
  if bad := not_finite(tensors):
    raise UserError(f"{path}: tensor '{bad}' has values that are not finite.")
  return tensors


def check_shapes(
  path: epath.PathLike,
  tensors: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  network: str,
) -> None:
  """Raises UserError unless the tensors are float32 with the names and shapes of a network.

  The message names the first missing or wrong tensor in the order of `shapes`.
  """
  for name, shape in shapes.items():
    expected = f"float32{list(shape)}"
    if name not in tensors:
      raise UserError(f"{path} has no tensor '{name}', which {network} needs, as {expected}.")
    result = f"{tensors[name].dtype}{list(tensors[name].shape)}"
    if result != expected:
      raise UserError(f"{path}: tensor '{name}' is {result}; in {network} it is {expected}.")
  if surplus := sorted(set(tensors) - set(shapes)):
    raise UserError(f"{path} has a tensor '{surplus[0]}', which {network} does not have.")


def digest(tensors: Mapping[str, np.ndarray]) -> str:
  """Computes the SHA-256 of the names, dtypes, shapes and bytes of tensors.

  The digest does not depend on the order of the tensors or on the metadata of their file.
  """
  total = hashlib.sha256()
  for name, tensor in sorted(tensors.items()):
    tensor = np.asarray(tensor)
    total.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode() + b"\n")
    total.update(tensor.tobytes())
  return total.hexdigest()
