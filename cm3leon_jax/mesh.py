"""The device mesh, and the one table that says which mesh axes a logical axis is split over."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Nothing else in the project says what is split over what.
RULES = {
  "batch": ("data", "fsdp"),
  "length": None,
  "layers": None,
  "act": None,  # width of activations
  "head_dim": None,
  "embed": "fsdp",  # width of parameters
  "heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",  # logits, and the table while it is used
  # The table at rest is split by vocabulary on every mesh; with ("fsdp", "tensor") a gather costs two permutes.
  "vocab_stored": ("tensor", "fsdp"),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Shape of the mesh. One axis may be -1: it takes the devices that the others leave.

  Attributes:
    data: replicas of the parameters; gradients are summed over it (across slices, the slow network).
    fsdp: parameters, optimizer state and batch are split over it.
    tensor: heads, feed-forward and vocabulary are split over it.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  def __post_init__(self):
    shape = (self.data, self.fsdp, self.tensor)
    if any(n < 1 and n != -1 for n in shape) or shape.count(-1) > 1:
      raise ValueError(f"(data, fsdp, tensor) is {shape}; each must be positive, and at most one -1 (the rest of the devices).")


def create_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
  """Mesh over `devices` (default: all) with explicit axes. Raises ValueError if the shape does not use them all."""
  devices = jax.devices() if devices is None else devices
  shape = [config.data, config.fsdp, config.tensor]
  known = math.prod(n for n in shape if n != -1)
  if -1 in shape and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if math.prod(shape) != len(devices):
    raise ValueError(f"mesh (data, fsdp, tensor) = {tuple(shape)} does not use {len(devices)} devices exactly.")
  return jax.make_mesh(tuple(shape), AXES, (AxisType.Explicit,) * 3, devices=devices)


def spec(*axes: str | None) -> P:
  """PartitionSpec of an array whose dimensions are the logical `axes`; None: not split.

  >>> spec("vocab_stored", None)
  PartitionSpec(('tensor', 'fsdp'), None)
  """
  return P(*(RULES[a] if a else None for a in axes))


def shard(x, *axes: str | None):
  """`x` laid out as its logical `axes` say; moves data if it lay otherwise. Needs a mesh (`jax.set_mesh`)."""
  return jax.sharding.reshard(x, spec(*axes))


def shardings(tree, mesh: jax.sharding.Mesh):
  """Tree of NamedSharding of a tree of typed arrays, abstract (`jax.eval_shape`) or not."""
  return jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), tree)


def batch_shards() -> int:
  """Into how many parts the current mesh splits a batch."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[axis] for axis in RULES["batch"])
