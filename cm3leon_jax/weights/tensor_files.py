"""Writes safetensors files tensor by tensor, so that a whole file is never in memory.

The format (https://github.com/huggingface/safetensors) has three parts. The first 8 bytes are the
size of the header, little endian. The header is JSON with the dtype, shape and offsets of every
tensor. The bytes of the tensors follow in the same order. If there are several files, an index
`model.safetensors.index.json` lists them, as `transformers` expects.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import math

from etils import epath
import ml_dtypes
import numpy as np

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import write_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5_000_000_000
# Name of a dtype -> (its name in safetensors files, its numpy dtype).
DTYPES: dict[str, tuple[str, np.dtype]] = {
  "float64": ("F64", np.dtype(np.float64)),
  "float32": ("F32", np.dtype(np.float32)),
  "float16": ("F16", np.dtype(np.float16)),
  "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
  "int8": ("I8", np.dtype(np.int8)),
  "int32": ("I32", np.dtype(np.int32)),
  "int64": ("I64", np.dtype(np.int64)),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Tensor to write; `make` computes it when it is written.

  `shape` is the shape of the result. The result is converted to `dtype`, a key of `DTYPES`.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  make: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """Number of bytes of the tensor in the file."""
    return self.size * DTYPES[self.dtype][1].itemsize


def remove(folder: epath.PathLike) -> None:
  """Removes the weights of an earlier export, if the folder has any.

  The index is removed first, so that a folder never looks complete after an interrupted removal.
  """
  folder = epath.Path(folder)
  (folder / INDEX).unlink(missing_ok=True)
  (folder / WEIGHTS).unlink(missing_ok=True)
  for path in sorted(folder.glob("model-*-of-*.safetensors")):
    path.unlink()


def write(
  folder: epath.PathLike, tensors: Sequence[Tensor], shard_bytes: int = SHARD_BYTES
) -> list[str]:
  """Writes tensors to one file, or to several files and then an index. Returns their names.

  Args:
    folder: receives the file `WEIGHTS`, or the file `INDEX` and the files that the index names.
    tensors: tensors in the order in which they are computed and written.
    shard_bytes: maximum total size of the tensors in a file. A larger tensor gets its own file.
  """
  folder = epath.Path(folder)
  shards = _split(tensors, shard_bytes)
  if len(shards) == 1:
    write_file(folder / WEIGHTS, tensors)
    return [WEIGHTS]
  places: dict[str, str] = {}
  for i, shard in enumerate(shards, 1):
    name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    write_file(folder / name, shard)
    places |= {tensor.name: name for tensor in shard}
  total = {"total_size": sum(tensor.bytes for tensor in tensors)}
  write_json(folder / INDEX, {"metadata": total, "weight_map": places})
  return [*dict.fromkeys(places.values()), INDEX]


def _split(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
  """Splits tensors into consecutive lists of at most `shard_bytes` bytes."""
  shards: list[list[Tensor]] = [[]]
  filled = 0
  for tensor in tensors:
    if shards[-1] and filled + tensor.bytes > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += tensor.bytes
  return shards


def header(tensors: Iterable[Tensor]) -> bytes:
  """Returns the bytes before the tensors of a file: the header's size, then the header."""
  described: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
  start = 0
  for tensor in tensors:
    kind = DTYPES[tensor.dtype][0]
    places = [start, start + tensor.bytes]
    described[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": places}
    start += tensor.bytes
  text = json.dumps(described, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # Tensors must begin at a multiple of 8 bytes.
  return len(text).to_bytes(8, "little") + text


def write_file(path: epath.Path, tensors: Sequence[Tensor]) -> None:
  """Writes tensors to one file, atomically."""
  with replacing(path) as file:
    file.write(header(tensors))
    for tensor in tensors:
      # In one statement, so that each tensor is freed before the next tensor is computed.
      file.write(_bytes(tensor))


def convert(name: str, made: np.ndarray, dtype: str) -> np.ndarray:
  """Converts an array to a dtype of `DTYPES`.

  Raises:
    UserError: the array contains a NaN, or a number that is infinite in this dtype.
  """
  with np.errstate(over="ignore"):
    converted = np.ascontiguousarray(made, DTYPES[dtype][1])
  if not np.isfinite(converted).all():
    raise UserError(
      f"{name} has values that are not finite in {dtype}, so it cannot be exported: use "
      "--dtype=float32, or another checkpoint if they are not finite in float32."
    )
  return converted


def _bytes(tensor: Tensor) -> memoryview:
  made = convert(tensor.name, tensor.make(), tensor.dtype)
  if made.shape != tensor.shape:
    raise ValueError(f"tensor {tensor.name} has shape {made.shape} instead of {tensor.shape}.")
  return made.reshape(-1).view(np.uint8).data
