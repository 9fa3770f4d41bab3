"""Arrays on another assignment of devices: the same mesh, on which each device does other work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree
import numpy as np

from cm3leon_jax.mesh import AXES, FSDP

# Between slices, along `data`, the network is slow: the last choice.
ROLLED = (*FSDP, "tensor", "data")


@dataclasses.dataclass(frozen=True)
class Assignment:
  """Devices rolled along an axis of a mesh: rings of devices, and slices, stay what they are.

  Attributes:
    axis: of the mesh.
    shift: places; 0: the devices stay where they are.
  """

  axis: str = AXES[0]
  shift: int = 0

  def mesh(self, mesh: Mesh) -> Mesh:
    """Returns the mesh in which `moved` puts arrays of `mesh`."""
    devices = np.roll(mesh.devices, -self.shift, AXES.index(self.axis))
    return Mesh(devices, mesh.axis_names, mesh.axis_types)


def assignments(mesh: Mesh) -> tuple[Assignment, Assignment]:
  """Returns two assignments that differ from `mesh` and from each other, if it has 3 devices.

  The second one is that of `mesh` if it has fewer.
  """
  found = [
    Assignment(axis, shift) for axis in ROLLED for shift in range(1, min(mesh.shape[axis], 3))
  ]
  first, second, *_ = (*found, Assignment(), Assignment())
  return first, second


def moved(tree: PyTree, source: Mesh, target: Mesh, assignment: Assignment) -> PyTree:
  """Copies a tree to other devices; over the network of the devices, not through a host.

  Args:
    tree: of arrays on `source`.
    source: a mesh.
    target: `assignment.mesh(source)`.
    assignment: of `target` in `source`.

  Returns:
    The tree on `target`, each array split over it as over `source`.
  """
  with jax.set_mesh(source):
    copies = _permuted(tree, assignment)
  return jax.tree.map(lambda x: _renamed(x, target), copies)


def moved_back(tree: PyTree, source: Mesh, target: Mesh, assignment: Assignment) -> PyTree:
  """Copies a tree that `moved` has made on `source` to `target`, where it came from."""
  inverse = Assignment(assignment.axis, -assignment.shift)
  return moved(tree, source, target, inverse)


@functools.partial(jax.jit, static_argnums=1)
def _permuted(tree: PyTree, assignment: Assignment) -> PyTree:
  """Copies what each device holds to the device `shift` places further along the axis."""
  size = jax.sharding.get_abstract_mesh().shape[assignment.axis]
  pairs = [(i, (i + assignment.shift) % size) for i in range(size)]
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)

  def copy(x: jax.Array) -> jax.Array:
    return jax.lax.ppermute(x, assignment.axis, pairs) if assignment.shift else jnp.copy(x)

  return jax.shard_map(
    lambda tree: jax.tree.map(copy, tree), in_specs=(specs,), out_specs=specs, check_vma=False
  )(tree)


def _renamed(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Makes an array on `mesh` of what the devices hold already; nothing is copied."""
  sharding = NamedSharding(mesh, x.sharding.spec)
  held = [shard.data for shard in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(x.shape, sharding, held)
