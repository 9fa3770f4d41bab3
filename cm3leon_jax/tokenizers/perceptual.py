"""Measures distances between images by their VGG16 features (LPIPS, Zhang et al. 2018).

The paper is arXiv 1801.03924. No package that this project uses contains the weights, so a user
must name a file that contains them.
"""

# B batch, H height, W width, C channels of a layer.

from collections.abc import Mapping
from typing import TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
import numpy as np

Pixels: TypeAlias = Float[Array | np.ndarray, "B H W 3"]
NETWORK = "VGG16 with the tensor names of torchvision"
# For each block: index in `features` -> (input channels, output channels). A pool follows each
# block. The distance compares the outputs of the five blocks before their pools.
BLOCKS = (
  {0: (3, 64), 2: (64, 64)},
  {5: (64, 128), 7: (128, 128)},
  {10: (128, 256), 12: (256, 256), 14: (256, 256)},
  {17: (256, 512), 19: (512, 512), 21: (512, 512)},
  {24: (512, 512), 26: (512, 512), 28: (512, 512)},
)
# Means and standard deviations of ImageNet's colors for pixels in [-1, 1], rounded as in LPIPS.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def tensor_shapes(calibrated: bool) -> dict[str, tuple[int, ...]]:
  """Returns tensor name -> shape. `calibrated` adds the five learned layers of LPIPS."""
  shapes: dict[str, tuple[int, ...]] = {}
  for number, block in enumerate(BLOCKS):
    for i, (inputs, outputs) in block.items():
      shapes[f"features.{i}.weight"] = (outputs, inputs, 3, 3)
      shapes[f"features.{i}.bias"] = (outputs,)
    if calibrated:
      shapes[_calibration(number)] = (1, outputs, 1, 1)
  return shapes


def _calibration(number: int) -> str:
  return f"lin{number}.model.1.weight"


def without_classifier(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Removes the tensors of the classifier, which torchvision's files also contain."""
  return {name: x for name, x in tensors.items() if not name.startswith("classifier.")}


def is_calibrated(tensors: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the tensors include a learned layer of LPIPS."""
  return any(_calibration(number) in tensors for number in range(len(BLOCKS)))


def make_params(tensors: Mapping[str, np.ndarray]) -> dict:
  """Converts the tensors of `tensor_shapes` to parameters of `distance`.

  Returns the HWIO kernel and the bias of each layer. If the tensors include the learned layers of
  LPIPS, also returns the [C] `calibration` of each block.
  """
  params: dict = {}
  for block in BLOCKS:
    for i in block:
      kernel = np.transpose(tensors[f"features.{i}.weight"], (2, 3, 1, 0))
      params[str(i)] = {"kernel": kernel, "bias": tensors[f"features.{i}.bias"]}
  if is_calibrated(tensors):
    result = [tensors[_calibration(n)].reshape(-1) for n in range(len(BLOCKS))]
    params["calibration"] = {str(n): x for n, x in enumerate(result)}
  return params


def activations(params: dict, x: Pixels) -> list[Float[Array, "B _ _ _"]]:
  """Computes the outputs of the five blocks, before their pools, for pixels in [-1, 1]."""
  shift, scale = (jnp.array(v, jnp.float32).reshape(1, 1, 1, 3) for v in (SHIFT, SCALE))
  x, result = (x - shift) / scale, []
  for number, block in enumerate(BLOCKS):
    if number:
      x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    for i in block:
      layer = params[str(i)]
      x = lax.conv_general_dilated(
        x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
      x = jax.nn.relu(x + layer["bias"].reshape(1, 1, 1, -1))
    result.append(x)
  return result


def distance(params: dict, x: Pixels, y: Pixels) -> Float32[Array, " B"]:
  """Computes the sum over blocks of the mean squared distance between normalized features.

  With the learned layers of LPIPS, the result is LPIPS. Without these layers, all channels have
  equal weights. `params` is the result of `make_params`, and pixels are in [-1, 1].
  """
  total = jnp.zeros(len(x), jnp.float32)
  for number, pair in enumerate(zip(activations(params, x), activations(params, y))):
    a, b = (_unit(features) for features in pair)
    squared = (a - b) ** 2
    if "calibration" in params:
      squared = squared * params["calibration"][str(number)].reshape(1, 1, 1, -1)
    total += squared.sum(-1).mean((1, 2))
  return total


def _unit(features: Float[Array | np.ndarray, "B H W C"]) -> Float[Array, "B H W C"]:
  """Scales the channels of every position to norm 1. Channels that are all 0 get gradient 0."""
  squares = jnp.sum(features * features, -1, keepdims=True)
  norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
  return features / (norms + 1e-10)
