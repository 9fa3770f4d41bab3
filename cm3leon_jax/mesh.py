"""The device mesh, and the one table of the mesh axes that a logical axis is split over."""

from collections.abc import Iterator, Sequence
import contextlib
import contextvars
import math
from typing import Annotated, Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree
import numpy as np
from pydantic import Field
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

AXES = ("data", "fsdp", "fsdp_inner", "tensor")
FSDP = ("fsdp", "fsdp_inner")
BATCH = ("data", *FSDP)  # Axes that a batch is split over.

# Logical axis -> mesh axes; nothing else in the project decides what is split over what.
RULES = {
  "batch": BATCH,
  "length": None,
  "layers": None,
  "act": None,  # Width of activations.
  "head_dim": None,
  "embed": FSDP,  # Width of parameters.
  "heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",  # Of logits, and of the output table while it is used.
  # Of tables as they are stored, on every mesh; with tensor last a gather costs two permutes.
  "vocab_stored": ("tensor", *FSDP),
  "largest": FSDP,  # Largest axis of an array of a small model, see `trainer.layout`.
}


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class MeshConfig:
  """Shape of the device mesh. One axis may be -1: it takes the remaining devices."""

  data: Annotated[int, Field(ge=-1)] = 1
  """Number of replicas of the parameters; gradients are summed over this axis (across slices, the
  slow network)."""
  fsdp: Annotated[int, Field(ge=-1)] = -1
  """Number of devices that parameters, optimizer state and batch are split over."""
  tensor: Annotated[int, Field(ge=-1)] = 1
  """Number of devices that heads, feed-forward and vocabulary are split over."""
  fsdp_inner: Annotated[int, Field(ge=-1)] = 1
  """Size of a second fsdp axis. On a pod, each of the two takes a dimension of the torus (16 and
  16 on v5e-256): XLA:TPU reduce-scatters gradients along one dimension, and all-reduces them, at
  twice the traffic, over an axis that spans two."""

  def __post_init__(self) -> None:
    if 0 in self.shape or self.shape.count(-1) > 1:
      raise ValueError(
        f"{_shown(self.shape)}; each must be positive, or one of them -1 (the remaining devices)."
      )

  @property
  def shape(self) -> tuple[int, ...]:
    """Sizes in the order of `AXES`."""
    return tuple(getattr(self, axis) for axis in AXES)

  def over(self, devices: int) -> dict[str, int]:
    """Returns the size of each axis on a number of devices.

      MeshConfig(fsdp=-1, tensor=4).over(256)
      {"data": 1, "fsdp": 64, "fsdp_inner": 1, "tensor": 4}

    Raises:
      ValueError: the shape does not use the devices exactly.
    """
    shape = list(self.shape)
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and devices % known == 0:
      shape[shape.index(-1)] = devices // known
    elif -1 in shape:
      raise ValueError(
        f"{_shown(shape)}; -1 stands for the remaining devices, so the product of the others must "
        f"divide {devices}, the number of devices; it is {known}."
      )
    elif known != devices:
      raise ValueError(
        f"{_shown(shape)}; their product must be {devices}, the number of devices, and is {known}; "
        "an axis of -1 takes the remaining devices."
      )
    return dict(zip(AXES, shape, strict=True))


def _shown(shape: Sequence[int]) -> str:
  return f"mesh ({', '.join(AXES)}) = {tuple(shape)}"


def create_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Makes a mesh of `devices` (default: all) with explicit axes.

  The network between slices (TPU slices, GPU hosts) is slow; they lie along `data`.

  Raises:
    ValueError: the shape does not use the devices exactly, or the number of slices does not divide
      `data`.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(config.over(len(devices)).values())
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if shape[0] % slices:
    raise ValueError(
      f"mesh.data is {shape[0]}; the devices are in {slices} slices, and it must be a multiple of "
      f"{slices}."
    )
  types = (AxisType.Explicit,) * len(AXES)
  # An axis may be a part of a dimension of the torus: tensor = 8 of 16 x 16 chips.
  if slices > 1:
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * len(shape[1:]))
    split = mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, allow_split_physical_axes=True
    )
  else:
    split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(split, AXES, types)


_unsplit = contextvars.ContextVar("unsplit", default=False)


@contextlib.contextmanager
def unsplit() -> Iterator[None]:
  """Sets no mesh, and within it nothing is split: programs that are traced name no sharding.

  `spec` is then None, and `shard` and `gathered` return what they get. Even on a mesh of one device
  a program has a constraint after almost every operation; an exported one must have none, so that
  its symbolic shapes can be refined, and that it runs on any devices.
  """
  token = _unsplit.set(True)
  try:
    with jax.set_mesh(None):
      yield
  finally:
    _unsplit.reset(token)


def spec(*axes: str | None) -> P | None:
  """Returns the PartitionSpec of an array with the logical `axes`; None is not split.

  >>> spec("vocab_stored", None)
  PartitionSpec(('tensor', 'fsdp', 'fsdp_inner'), None)
  """
  return None if _unsplit.get() else P(*(RULES[a] if a else None for a in axes))


def shard(x: Array | np.ndarray, *axes: str | None) -> Array:
  """Splits `x` by its logical `axes`; moves data if necessary. Needs a mesh (`jax.set_mesh`)."""
  return x if _unsplit.get() else jax.sharding.reshard(x, spec(*axes))


def gathered(w: Array) -> Array:
  """Gathers a parameter over the fsdp axes for its use.

  It is gathered over one axis at a time, so that each is an all-gather along one dimension of the
  torus, and of the gradient a reduce-scatter along it; the gradient is then summed over `data`.
  `reduced` in its type makes JAX sum the gradients here, once, and not at each use.

  Args:
    w: laid out as it is stored; in the dtype that is sent.

  Returns:
    `w`, split over `tensor` alone.
  """
  if _unsplit.get():
    return w
  split = [
    (axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in jax.typeof(w).sharding.spec
  ]
  done: set[str] = set()
  for axis in ("data", *reversed(FSDP)):
    split = [tuple(a for a in axes if a != axis) for axes in split]
    done.add(axis)
    w = jax.sharding.reshard(w, P(*(axes or None for axes in split), reduced=frozenset(done)))
  return w


def shardings(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Returns the NamedShardings of a tree of arrays or of types (`jax.eval_shape`)."""
  return jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), tree)


def abstract(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Returns the types and shardings on `mesh` of a tree of arrays, types or host arrays (whole)."""

  def place(x: Any) -> jax.ShapeDtypeStruct:
    spec = P()
    if isinstance(sharding := getattr(x, "sharding", None), NamedSharding):
      spec = sharding.spec  # Also over automatic axes, which the type does not name.
    elif isinstance(x, jax.Array | jax.ShapeDtypeStruct):
      spec = jax.typeof(x).sharding.spec
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(place, tree)


def batch_shards() -> int:
  """Returns the number of parts into which the current mesh splits a batch."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[axis] for axis in BATCH)
