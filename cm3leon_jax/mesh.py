"""Creates the device mesh and maps logical array axes to mesh axes in one table, `RULES`."""

from collections.abc import Iterator, Sequence
import contextlib
import contextvars
import math
from typing import Annotated, Any

from etils import epy
import numpy as np
from pydantic import Field
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT

with epy.lazy_imports():  # The settings import this module, and are read before JAX is imported.
  import jax
  from jax.experimental import mesh_utils

AXES = ("data", "fsdp", "fsdp_inner", "tensor")
FSDP = ("fsdp", "fsdp_inner")
BATCH = ("data", *FSDP)  # Mesh axes over which a batch is sharded.

# Maps logical axes to mesh axes. Only this table decides how arrays are sharded.
RULES = {
  "batch": BATCH,
  "length": None,
  "layers": None,
  "act": None,  # Width of activations.
  "head_dim": None,
  "embed": FSDP,  # Width of parameters.
  "rank": None,  # Rank of adapters.
  "heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",  # Logits, and the output table while it is used.
  # Rows of stored embedding tables. If `tensor` were last, a gather would need two more collective
  # permutes.
  "vocab_stored": ("tensor", *FSDP),
  "largest": FSDP,  # Largest axis of each array of a small model; see `trainer.layout`.
}


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class MeshConfig:
  """Shape of the device mesh. One axis may be -1, which means the remaining devices."""

  data: Annotated[int, Field(ge=-1)] = 1
  """Number of replicas of the parameters. Gradients are summed over this axis, which is the only
  axis that spans slices, because the network between slices is slow."""
  fsdp: Annotated[int, Field(ge=-1)] = -1
  """Number of devices over which parameters, optimizer state and batch are sharded."""
  tensor: Annotated[int, Field(ge=-1)] = 1
  """Number of devices over which heads, feed-forward and vocabulary are sharded."""
  fsdp_inner: Annotated[int, Field(ge=-1)] = 1
  """Size of a second fsdp axis. On a pod, `fsdp` and `fsdp_inner` should each span one dimension of
  the torus (16 and 16 on v5e-256), because XLA:TPU then reduce-scatters the gradients. Over an axis
  that spans two dimensions, it uses all-reduce instead, which doubles the traffic."""

  def __post_init__(self) -> None:
    if 0 in self.shape or self.shape.count(-1) > 1:
      raise ValueError(
        f"{_shown(self.shape)}; each must be positive, except that one may be -1 (the remaining "
        "devices)."
      )

  @property
  def shape(self) -> tuple[int, ...]:
    """Sizes of the axes, in the order of `AXES`."""
    return tuple(getattr(self, axis) for axis in AXES)

  def over(self, devices: int) -> dict[str, int]:
    """Returns the size of each axis for a number of devices.

      MeshConfig(fsdp=-1, tensor=4).over(256)
      {"data": 1, "fsdp": 64, "fsdp_inner": 1, "tensor": 4}

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    shape = list(self.shape)
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and devices % known == 0:
      shape[shape.index(-1)] = devices // known
    elif -1 in shape:
      raise ValueError(
        f"{_shown(shape)}; -1 means the remaining devices, so the product of the other axes, "
        f"{known}, must divide the number of devices, {devices}."
      )
    elif known != devices:
      raise ValueError(
        f"{_shown(shape)}; the product is {known}, but must be {devices}, the number of devices; "
        "an axis of -1 takes the remaining devices."
      )
    return dict(zip(AXES, shape, strict=True))


def _shown(shape: Sequence[int]) -> str:
  return f"mesh ({', '.join(AXES)}) = {tuple(shape)}"


def create_mesh(
  config: MeshConfig, devices: "Sequence[jax.Device] | None" = None
) -> "jax.sharding.Mesh":
  """Creates a mesh of `devices`, by default all, with explicit axes.

  Slices (TPU slices or GPU hosts) are placed along the axis `data`, because the network between
  them is slow.

  Raises:
    ValueError: the product of the sizes is not the number of devices, or `data` is not a multiple
      of the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(config.over(len(devices)).values())
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if shape[0] % slices:
    raise ValueError(
      f"mesh.data is {shape[0]}; the devices are in {slices} slices, so it must be a multiple of "
      f"{slices}."
    )
  types = (jax.sharding.AxisType.Explicit,) * len(AXES)
  # An axis may span a part of a torus dimension, such as tensor = 8 on 16 x 16 chips.
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
  """Traces programs without a mesh and without sharding constraints.

  Within this context, `spec` returns None, and `shard` and `gathered` return their input. An
  exported program must not contain sharding constraints, because it must run on any devices and
  allow symbolic shapes. A mesh of one device would still add constraints.
  """
  token = _unsplit.set(True)
  try:
    with jax.set_mesh(None):
      yield
  finally:
    _unsplit.reset(token)


def spec(*axes: str | None) -> "jax.P | None":
  """Returns the PartitionSpec of an array with the logical `axes`. None means not sharded.

  >>> spec("vocab_stored", None)
  PartitionSpec(('tensor', 'fsdp', 'fsdp_inner'), None)
  """
  return None if _unsplit.get() else jax.P(*(RULES[a] if a else None for a in axes))


def shard(x: "jax.Array | np.ndarray", *axes: str | None) -> "jax.Array":
  """Reshards `x` by its logical `axes`. Needs a current mesh (`jax.set_mesh`)."""
  return x if _unsplit.get() else jax.sharding.reshard(x, spec(*axes))


def gathered(w: "jax.Array") -> "jax.Array":
  """Gathers a parameter over the fsdp axes. The result is sharded only over `tensor`.

  `w` has the sharding in which it is stored, and the dtype in which devices exchange it. The fsdp
  axes are gathered one after the other. The forward pass thus needs one all-gather per torus
  dimension, and the backward pass one reduce-scatter. The gradient is then summed over `data`. The
  annotation `reduced` makes JAX sum the gradients once, here, instead of at each use of `w`.
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
    w = jax.sharding.reshard(w, jax.P(*(axes or None for axes in split), reduced=frozenset(done)))
  return w


def shardings(tree: Any, mesh: "jax.sharding.Mesh") -> Any:
  """Returns the NamedSharding of each array, or `jax.eval_shape` result, in a tree."""
  return jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, jax.typeof(x).sharding.spec), tree)


def abstract(tree: Any, mesh: "jax.sharding.Mesh") -> Any:
  """Returns the shapes, dtypes and shardings of a tree on `mesh`. Host arrays become replicated."""

  def place(x: Any) -> "jax.ShapeDtypeStruct":
    spec = jax.P()
    if isinstance(sharding := getattr(x, "sharding", None), jax.sharding.NamedSharding):
      spec = sharding.spec  # Includes automatic axes, which `jax.typeof` omits.
    elif isinstance(x, jax.Array | jax.ShapeDtypeStruct):
      spec = jax.typeof(x).sharding.spec
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  return jax.tree.map(place, tree)


def batch_shards(mesh: "jax.sharding.Mesh | None" = None) -> int:
  """Returns the number of devices over which a mesh, by default the current one, shards a batch."""
  shape = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
  return math.prod(shape[axis] for axis in BATCH)
