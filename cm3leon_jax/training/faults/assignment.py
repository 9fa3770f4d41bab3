"""Moves arrays to other devices: the target mesh contains the same devices in another order."""

import functools

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree
import numpy as np

from cm3leon_jax.mesh import AXES, FSDP

# Mesh axes along which devices may be rolled, in order of preference. `data` is last, because the
# network between slices is slow.
ROLLED = (*FSDP, "tensor", "data")


def rolled(mesh: Mesh) -> Mesh:
  """Rolls the devices by one place along a mesh axis, which keeps rings and slices intact.

  A mesh of one device stays as it is.
  """
  devices = np.roll(mesh.devices, -1, AXES.index(_axis(mesh)))
  return Mesh(devices, mesh.axis_names, mesh.axis_types)


def moved(tree: PyTree, mesh: Mesh) -> PyTree:
  """Copies a tree from `mesh` to `rolled(mesh)` over the network between devices.

  Each array stays sharded as on `mesh`.
  """
  with jax.set_mesh(mesh):
    copies = _permuted(tree, _axis(mesh))
  target = rolled(mesh)
  return jax.tree.map(lambda x: _renamed(x, target), copies)


def _axis(mesh: Mesh) -> str:
  return next((axis for axis in ROLLED if mesh.shape[axis] > 1), ROLLED[0])


@functools.partial(jax.jit, static_argnums=1)
def _permuted(tree: PyTree, axis: str) -> PyTree:
  """Copies the shards of each device to the next device along a mesh axis."""
  size = jax.sharding.get_abstract_mesh().shape[axis]
  pairs = [(i, (i + 1) % size) for i in range(size)]
  specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)

  def copy(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)

  return jax.shard_map(copy, in_specs=(specs,), out_specs=specs, check_vma=False)(tree)


def _renamed(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Returns an array on `mesh`, without copies: its shards are already on the devices of `mesh`."""
  sharding = NamedSharding(mesh, x.sharding.spec)
  held = [shard.data for shard in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(x.shape, sharding, held)
