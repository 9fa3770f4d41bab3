"""Computes features for the Frechet Inception Distance (Heusel et al. 2017, arXiv 1706.08500).

The network is the Inception-v3 of the TensorFlow graph of 2015-12-05, as pytorch-fid and
torch-fidelity rebuild it. It differs from the network of Szegedy et al. (2015, arXiv 1512.00567)
and of torchvision: its average pools exclude padding, its last block uses a max pool, it has 1,008
classes, and its weights are different.
"""

# B batch, H height, W width, C channels, D width of the features.

from collections.abc import Sequence
import functools
from typing import Any, Literal, NamedTuple, get_args

from etils import epath
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, UInt8
import numpy as np

from cm3leon_jax.evaluation.metrics import published_weights

NETWORK = "Inception-v3 of the FID"
SIDE = 299
WIDTH = 2048
CLASSES = 1008
EPSILON = 1e-3
ROWS_PER_DEVICE = 32
Resize = Literal["tf1", "torch"]
# Suffix of the names of PyTorch's batch counters, which inference ignores and some files lack.
COUNTER = "num_batches_tracked"


class Conv(NamedTuple):
  """A convolution without bias, a batch norm and a ReLU."""

  name: str
  channels: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"


# Names of 3 x 3 pools: mean with stride 1, maximum with stride 1, maximum with stride 2.
MEAN, MAX, HALVE = "mean", "max", "halve"


def _mixed(name: str, *branches: list) -> tuple:
  """Builds a block of parallel branches, whose outputs are concatenated along the channels.

  A branch is a list of layers. A layer is a convolution, a pool, or a tuple of parallel branches. A
  convolution is given as its name without "branch", followed by the other fields of `Conv`.
  """

  def build(layer: Any) -> Any:
    if isinstance(layer, str):
      return layer
    if isinstance(layer[0], list):
      return tuple([build(s) for s in branch] for branch in layer)
    return Conv(f"{name}.branch{layer[0]}", *layer[1:])

  return build(branches)


def _mixed_35(name: str, pooled: int) -> tuple:
  """Builds a block for a grid of 35 x 35 positions, `InceptionA` in torchvision."""
  return _mixed(
    name,
    [("1x1", 64)],
    [("5x5_1", 48), ("5x5_2", 64, (5, 5))],
    [("3x3dbl_1", 64), ("3x3dbl_2", 96, (3, 3)), ("3x3dbl_3", 96, (3, 3))],
    [MEAN, ("_pool", pooled)],
  )


def _mixed_17(name: str, width: int) -> tuple:
  """Builds a block for a grid of 17 x 17 positions, `InceptionC` in torchvision."""
  row, column = (1, 7), (7, 1)
  return _mixed(
    name,
    [("1x1", 192)],
    [("7x7_1", width), ("7x7_2", width, row), ("7x7_3", 192, column)],
    [
      ("7x7dbl_1", width), ("7x7dbl_2", width, column), ("7x7dbl_3", width, row),
      ("7x7dbl_4", width, column), ("7x7dbl_5", 192, row),
    ],
    [MEAN, ("_pool", 192)],
  )  # fmt: skip


def _mixed_8(name: str, pool: str) -> tuple:
  """Builds a block for a grid of 8 x 8 positions, `InceptionE` in torchvision."""

  def cross(part: str) -> tuple:
    return [(f"{part}a", 384, (1, 3))], [(f"{part}b", 384, (3, 1))]

  return _mixed(
    name,
    [("1x1", 320)],
    [("3x3_1", 384), cross("3x3_2")],
    [("3x3dbl_1", 448), ("3x3dbl_2", 384, (3, 3)), cross("3x3dbl_3")],
    [pool, ("_pool", 192)],
  )


_HALVING = ((3, 3), 2, "VALID")
LAYERS = [
  Conv("Conv2d_1a_3x3", 32, *_HALVING),
  Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
  Conv("Conv2d_2b_3x3", 64, (3, 3)),
  HALVE,
  Conv("Conv2d_3b_1x1", 80),
  Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
  HALVE,
  _mixed_35("Mixed_5b", 32),
  _mixed_35("Mixed_5c", 64),
  _mixed_35("Mixed_5d", 64),
  _mixed(
    "Mixed_6a",
    [("3x3", 384, *_HALVING)],
    [("3x3dbl_1", 64), ("3x3dbl_2", 96, (3, 3)), ("3x3dbl_3", 96, *_HALVING)],
    [HALVE],
  ),
  _mixed_17("Mixed_6b", 128),
  _mixed_17("Mixed_6c", 160),
  _mixed_17("Mixed_6d", 160),
  _mixed_17("Mixed_6e", 192),
  _mixed(
    "Mixed_7a",
    [("3x3_1", 192), ("3x3_2", 320, *_HALVING)],
    [
      ("7x7x3_1", 192), ("7x7x3_2", 192, (1, 7)), ("7x7x3_3", 192, (7, 1)),
      ("7x7x3_4", 192, *_HALVING),
    ],
    [HALVE],
  ),
  _mixed_8("Mixed_7b", MEAN),
  _mixed_8("Mixed_7c", MAX),
]  # fmt: skip


def _kernel_shapes(layers: list, channels: int) -> tuple[dict[str, tuple[int, ...]], int]:
  """Returns the shape [out, in, height, width] of each kernel, and the final number of channels."""
  shapes: dict[str, tuple[int, ...]] = {}
  for layer in layers:
    if isinstance(layer, Conv):
      shapes[layer.name] = (layer.channels, channels, *layer.kernel)
      channels = layer.channels
    elif isinstance(layer, tuple):
      branches = [_kernel_shapes(branch, channels) for branch in layer]
      for found, _ in branches:
        shapes |= found
      channels = sum(after for _, after in branches)
  return shapes, channels


def tensor_shapes() -> dict[str, tuple[int, ...]]:
  """Maps the name of each tensor in PyTorch's state dict, except counters, to its shape."""
  shapes = {}
  for name, kernel in _kernel_shapes(LAYERS, 3)[0].items():
    shapes[f"{name}.conv.weight"] = kernel
    for field in ("weight", "bias", "running_mean", "running_var"):
      shapes[f"{name}.bn.{field}"] = kernel[:1]
  return shapes | {"fc.weight": (CLASSES, WIDTH), "fc.bias": (CLASSES,)}


def make_params(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
  """Converts the tensors of a PyTorch state dict to parameters.

  Returns:
    For each convolution, `kernel` [height, width, in, out], and the batch norm as `scale` [out] and
    `shift` [out], all in float32.
  """
  params = {}
  for name in _kernel_shapes(LAYERS, 3)[0]:
    norm = {
      field: tensors[f"{name}.bn.{field}"].astype(np.float64)
      for field in ("weight", "bias", "running_mean", "running_var")
    }
    scale = norm["weight"] / np.sqrt(norm["running_var"] + EPSILON)
    shift = norm["bias"] - norm["running_mean"] * scale
    kernel = np.ascontiguousarray(tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0))
    params[name] = {
      "kernel": kernel,
      "scale": scale.astype(np.float32),
      "shift": shift.astype(np.float32),
    }
  return params


def _pool(x: Array, kind: str) -> Array:
  """Applies a 3 x 3 pool. A mean counts only positions inside the image."""
  if kind == MEAN:
    return nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
  if kind == MAX:
    return nnx.max_pool(x, (3, 3), padding="SAME")
  return nnx.max_pool(x, (3, 3), (2, 2), padding="VALID")


def _run(layers: list, params: dict, x: Array) -> Array:
  for layer in layers:
    if isinstance(layer, str):
      x = _pool(x, layer)
    elif isinstance(layer, Conv):
      arrays = params[layer.name]
      x = lax.conv_general_dilated(
        x, arrays["kernel"], (layer.stride, layer.stride), layer.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,  # TPUs and GPUs would use lower precision.
      )  # fmt: skip
      scale, shift = (arrays[name][None, None, None] for name in ("scale", "shift"))
      x = jax.nn.relu(x * scale + shift)
    else:
      x = jnp.concatenate([_run(branch, params, x) for branch in layer], axis=-1)
  return x


@jax.jit
def pool3(params: dict, pixels: Float32[Array, "B 299 299 3"]) -> Float32[Array, "B D"]:
  """Computes the features of the FID: the output of the last block, averaged over 8 x 8 positions.

  See `make_params` for `params`, and `resize_images` for `pixels`.
  """
  return _run(LAYERS, params, pixels).mean((1, 2))


def _positions(size: int, resize: Resize) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns, for each of `SIDE` output pixels, the input pixels before and after it, and a weight.

  The weight is that of the input pixel after; the input pixel before has 1 minus this weight. "tf1"
  measures positions from the corners of pixels, which shifts the image. "torch" measures positions
  from the centers of pixels. Both methods compute in float32, and neither method applies
  antialiasing when it shrinks an image.
  """
  places, scale = np.arange(SIDE, dtype=np.float32), np.float32(size / SIDE)
  if resize == "tf1":
    places = places * scale
  else:
    places = np.maximum((places + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
  before = places.astype(np.int32)
  return before, np.minimum(before + 1, size - 1), places - before


@functools.partial(jax.jit, static_argnums=1)
def resize_images(images: UInt8[Array, "B H W 3"], resize: Resize) -> Float32[Array, "B 299 299 3"]:
  """Resizes images bilinearly and scales their pixels to about [-1, 1].

  "tf1" resizes as torch-fidelity and TensorFlow 1 do. Black becomes -1, and white becomes
  127 / 128. "torch" resizes as pytorch-fid does. Black becomes -1, and white becomes 1. The two
  methods give different values of the FID.
  """
  x = images.astype(jnp.float32)
  for axis in (2, 1):
    before, after, weight = _positions(images.shape[axis], resize)
    weight = np.expand_dims(weight, [a for a in range(4) if a != axis])
    low, high = (jnp.take(x, places, axis) for places in (before, after))
    x = low + (high - low) * weight
  return (x - 128) / 128 if resize == "tf1" else x / 127.5 - 1


class Inception:
  """Inception-v3 with its weights.

  The parameters are replicated on all devices, and each device embeds its share of a batch. All
  batches have the same shape, so the network is compiled once for all image sizes. `digest` is the
  `published_weights.digest` of all tensors except batch counters. For `resize`, see
  `resize_images`.
  """

  def __init__(
    self,
    tensors: dict[str, np.ndarray],
    resize: Resize = "tf1",
    devices: Sequence[jax.Device] | None = None,
    rows_per_device: int = ROWS_PER_DEVICE,
  ):
    """Puts the parameters on `devices`, by default on all devices of this host.

    `tensors` have the names and shapes of `tensor_shapes`.
    """
    if resize not in get_args(Resize):
      raise ValueError(f"resize is '{resize}'; it must be one of {', '.join(get_args(Resize))}.")
    devices = list(devices or jax.local_devices())
    self.mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    self.resize, self._size = resize, rows_per_device * len(devices)
    self.digest = published_weights.digest(tensors)
    self._params = jax.device_put(make_params(tensors), NamedSharding(self.mesh, P()))

  @classmethod
  def load(cls, path: epath.PathLike, resize: Resize = "tf1", **options: Any) -> "Inception":
    """Reads a safetensors file with the tensor names of pytorch-fid or torch-fidelity.

    Raises:
      UserError: the file is absent, damaged or a pickle, or does not have the tensors of
        `tensor_shapes`.
    """
    tensors = published_weights.read_tensors(path)
    tensors = {name: x for name, x in tensors.items() if not name.endswith("." + COUNTER)}
    published_weights.check_shapes(path, tensors, tensor_shapes(), NETWORK)
    return cls(tensors, resize, **options)

  def embed_images(self, images: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B D"]:
    """Computes `pool3` of images of any size."""
    out, sharding = np.zeros((len(images), WIDTH), np.float32), NamedSharding(self.mesh, P("data"))
    for start in range(0, len(images), self._size):
      batch = images[start : start + self._size]
      padded = np.pad(batch, ((0, self._size - len(batch)), (0, 0), (0, 0), (0, 0)))
      with jax.set_mesh(self.mesh):  # The caller's mesh may have other axes.
        pixels = resize_images(jax.device_put(padded, sharding), self.resize)
        features = pool3(self._params, pixels)
      out[start : start + len(batch)] = np.asarray(features)[: len(batch)]
    return out
