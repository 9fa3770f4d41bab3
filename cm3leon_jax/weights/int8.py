"""Quantizes layer weights to int8 with one scale per output channel, as `compressed-tensors` does.

This quantization is weight-only (W8A16): engines use weight = int8 x scale. In the format
`pack-quantized`, 128 is added to each int8 number, and each int32 packs four numbers, lowest byte
first. vLLM and transformers read weight-only quantization only in this format. Embeddings, head,
norms and positions keep their dtype.
"""

from collections.abc import Sequence
import functools
import math

from flax import traverse_util
import numpy as np

from cm3leon_jax.weights.tensor_files import DTYPES, Tensor

PACKED = 4  # int8 numbers per int32.
MAXIMUM = 127
STACKS = ("qkv", "kv")  # Parameters under `blocks` that stack a matrix for each of their letters.
MATRICES = (*STACKS, "q", "out", "up", "down", "gate")
CONFIG = {
  "quant_method": "compressed-tensors",
  "format": "pack-quantized",
  "quantization_status": "compressed",
  "config_groups": {
    "group_0": {
      "targets": ["Linear"],
      "weights": {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
      },
    }
  },
  "ignore": ["lm_head"],
}


def quantize(weight: np.ndarray, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
  """Rounds a matrix [out, in] to int8 x scale. The scale has shape [out, 1] and dtype `dtype`.

  The number with the largest magnitude in a row becomes 127 or -127. The error of an element is at
  most scale / 2. If the scale is rounded to 16 bits, the error grows by at most 127 x the rounding
  error of the scale.

    quantize([[1.0, -2.54], [0.0, 0.0]])
    int8 [[50, -127], [0, 0]], scale [[0.02], [1.0]]
  """
  largest = np.abs(weight).max(axis=1, keepdims=True)
  scale = np.where(largest > 0, largest / MAXIMUM, 1).astype(DTYPES[dtype][1])
  rounded = np.rint(weight / scale.astype(np.float32))
  return np.clip(rounded, -MAXIMUM, MAXIMUM).astype(np.int8), scale


def pack(values: np.ndarray) -> np.ndarray:
  """Packs int8 [out, in] into int32 [out, ceil(in / 4)].

  pack([[-128, -127, 0, 1]])
  [[0x81800100]], as an int32: -2122317568
  """
  shifted = (values.astype(np.int16) + 128).astype(np.uint8)
  padded = np.pad(shifted, ((0, 0), (0, -values.shape[1] % PACKED)))
  return np.ascontiguousarray(padded).view("<i4")


def quantized(tensors: Sequence[Tensor]) -> list[Tensor]:
  """Replaces each matrix of a layer by three tensors: packed int8 numbers, scales and shape.

  Matrices are [out, in], and their names end with `.weight`, as in transformers.
  """
  result: list[Tensor] = []
  for tensor in tensors:
    # Norms may have a vector for each head.
    if ".layers." not in tensor.name or len(tensor.shape) != 2 or "norm" in tensor.name:
      result.append(tensor)
      continue
    rows, columns = tensor.shape
    made = functools.partial(_made, {}, tensor)
    result += [
      Tensor(f"{tensor.name}_scale", (rows, 1), tensor.dtype, functools.partial(made, "scale")),
      Tensor(
        f"{tensor.name}_packed",
        (rows, math.ceil(columns / PACKED)),
        "int32",
        functools.partial(made, "packed"),
      ),
      Tensor(f"{tensor.name}_shape", (2,), "int64", functools.partial(np.array, (rows, columns))),
    ]
  return result


def _made(kept: dict, tensor: Tensor, part: str) -> np.ndarray:
  """Returns one part of a quantized matrix, "packed" or "scale", and removes it from `kept`.

  The first call quantizes the matrix and stores both parts in `kept`.
  """
  if not kept:
    values, kept["scale"] = quantize(np.asarray(tensor.make(), np.float32), tensor.dtype)
    kept["packed"] = pack(values)
  return kept.pop(part)


def rounded(params: dict, dtype: str, quantize_layers: bool) -> dict:
  """Rounds parameters as an export with `dtype` does. Returns them as fp32 arrays in host memory.

  If `quantize_layers`, rounds the matrices of the layers to int8.
  """
  flat = traverse_util.flatten_dict(params)
  kind = DTYPES[dtype][1]
  result = {}
  for path, x in flat.items():
    x = np.asarray(x, np.float32)
    if quantize_layers and path[0] == "blocks" and path[1] in MATRICES:
      result[path] = _dequantized(path[1], x, dtype)
    else:
      result[path] = x.astype(kind).astype(np.float32)
  return traverse_util.unflatten_dict(result)


def _dequantized(name: str, x: np.ndarray, dtype: str) -> np.ndarray:
  """Rounds the matrices `x` of all layers to int8 and back. Their last axes are the outputs."""
  inputs = x.shape[1] * x.shape[2] if name == "out" else x.shape[2 if name in STACKS else 1]
  matrices = x.reshape(x.shape[0] * (len(name) if name in STACKS else 1), inputs, -1)
  result = np.empty_like(matrices)
  for i, matrix in enumerate(matrices):
    values, scale = quantize(matrix.T, dtype)
    result[i] = (values * scale.astype(np.float32)).T
  return result.reshape(x.shape)
