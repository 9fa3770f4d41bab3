"""Moves arrays to other devices: the target mesh contains the same devices in another order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree
import numpy as np

from cm3leon_jax.mesh import AXES, FSDP

# Mesh axes along which devices may be rolled, in order of preference. `data` is last, because the
# network between slices is slow.
ROLLED = (*FSDP, "tensor", "data")


@dataclasses.dataclass(frozen=True)
class Assignment:
  """Rolls the devices by `shift` places along a mesh axis, which keeps rings and slices intact."""

  axis: str = AXES[0]
  shift: int = 0

  def mesh(self, mesh: Mesh) -> Mesh:
    """Returns the mesh to which `moved` copies arrays of `mesh`."""
    devices = np.roll(mesh.devices, -self.shift, AXES.index(self.axis))
    return Mesh(devices, mesh.axis_names, mesh.axis_types)


def assignments(mesh: Mesh) -> tuple[Assignment, Assignment]:
  """Returns two assignments whose meshes differ from `mesh` and from each other.

  The mesh needs one axis of at least 3 devices, or two axes of at least 2 devices each. On a
  smaller mesh, the second assignment, or both, leave all arrays on their devices.
  """
  found = [
    Assignment(axis, shift) for axis in ROLLED for shift in range(1, min(mesh.shape[axis], 3))
  ]
  first, second, *_ = (*found, Assignment(), Assignment())
  return first, second


def moved(tree: PyTree, source: Mesh, target: Mesh, assignment: Assignment) -> PyTree:
  """Copies a tree to other devices over the network between devices, not through a host.

  `source` is the mesh of the tree, and `target` is `assignment.mesh(source)`. Each array stays
  sharded as on `source`.
  """
  with jax.set_mesh(source):
    copies = _permuted(tree, assignment)
  return jax.tree.map(lambda x: _renamed(x, target), copies)


def moved_back(tree: PyTree, source: Mesh, target: Mesh, assignment: Assignment) -> PyTree:
  """Copies a result of `moved` from the mesh `source` back to its original mesh `target`."""
  inverse = Assignment(assignment.axis, -assignment.shift)
  return moved(tree, source, target, inverse)


@functools.partial(jax.jit, static_argnums=1)
def _permuted(tree: PyTree, assignment: Assignment) -> PyTree:
  """Copies the shards of each device to the device `shift` places further along the mesh axis."""
  size = jax.sharding.get_abstract_mesh().shape[assignment.axis]
  pairs = [(i, (i + assignment.shift) % size) for i in range(size)]
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)

  def copy(x: jax.Array) -> jax.Array:
    return jax.lax.ppermute(x, assignment.axis, pairs) if assignment.shift else jnp.copy(x)

  return jax.shard_map(
    lambda tree: jax.tree.map(copy, tree), in_specs=(specs,), out_specs=specs, check_vma=False
  )(tree)


def _renamed(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Returns an array on `mesh`, without copies: its shards are already on the devices of `mesh`."""
  sharding = NamedSharding(mesh, x.sharding.spec)
  held = [shard.data for shard in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(x.shape, sharding, held)
