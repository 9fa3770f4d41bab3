"""Computes fingerprints: a number per array and device that reveals silent hardware errors.

Several devices may store replicas of one shard, and these replicas must be equal. Each device adds
the same update to its replica, so an error in one replica persists. A repeated step reads the same
wrong replica and gives the same result, so only a comparison of the replicas reveals the error.
"""

# D devices of the mesh, in the order of `mesh.devices.flat`; N arrays of a tree.

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree, UInt32
import numpy as np

from cm3leon_jax.mesh import AXES

# Odd; its multiples are spread over all 32-bit numbers (Knuth 1998, vol. 3, section 6.4).
GOLDEN = 0x9E3779B1


def fingerprint(tree: PyTree) -> UInt32[Array, "D N"]:
  """Computes the fingerprint of a tree of arrays under jit. The result is replicated.

  It is the sum of the bits of an array's elements, as 32-bit words, each multiplied by an odd
  number, modulo 2^32. A change of one word always changes it. Each device reads its own shard or
  replica, so each replica has its own entry.
  """
  leaves = jax.tree.leaves(tree)
  specs = [jax.typeof(x).sharding.spec for x in leaves]
  digests = jax.shard_map(
    lambda xs: jnp.stack([_of_array(x) for x in xs])[None],
    in_specs=(specs,),
    out_specs=jax.P(AXES, None),
    check_vma=False,
  )(leaves)
  return jax.sharding.reshard(digests, jax.P(None, None))


def _of_array(x: Array) -> UInt32[Array, ""]:
  weights = _numbers(x.shape) * jnp.uint32(GOLDEN) | 1
  return jnp.sum(_words(x) * weights, dtype=jnp.uint32)


def _words(x: Array) -> Array:
  """Returns the bits of each element as a uint32. Elements have at most 32 bits."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _numbers(shape: tuple[int, ...]) -> Array:
  """Returns the index of each element, from 0. The compiler fuses this array: it uses no memory.

  shape (2, 3) -> [[0 1 2] [3 4 5]]
  """
  numbers = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :]) % 2**32
    numbers += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
  return numbers


def names_of(tree: PyTree) -> list[str]:
  """Returns the names of a tree's arrays in the order of a fingerprint, e.g. "params.embed"."""
  return [
    jax.tree_util.keystr(path, simple=True, separator=".")
    for path, _ in jax.tree.leaves_with_path(tree)
  ]


fingerprint_of: Callable = jax.jit(fingerprint)


def first_replicas(tree: PyTree, mesh: Mesh) -> Int[np.ndarray, "D N"]:
  """Returns, for each device and array, the place of the first device with a replica of its shard.

  One array, sharded over fsdp, on a mesh of 2 x 2 (data, fsdp): [[0] [1] [0] [1]]
  """
  devices, columns = mesh.devices.flatten().tolist(), []
  for x in jax.tree.leaves(tree):
    indices = x.sharding.devices_indices_map(x.shape)
    first: dict[tuple, int] = {}
    parts = [tuple((s.start, s.stop) for s in indices[device]) for device in devices]
    columns.append([first.setdefault(part, place) for place, part in enumerate(parts)])
  return np.array(columns).T


def different_replicas(
  found: UInt32[np.ndarray, "D N"], first: Int[np.ndarray, "D N"]
) -> tuple[list[int], list[int]]:
  """Compares the replicas of each shard.

    digests of an array that is replicated on 5 devices: [7 7 5 7 7] -> device 2
    of an array with two shards, each on 2 of 4 devices: [7 8 7 9] -> devices 1 and 3
    of an array that is replicated on 4 devices: [7 7 5 5] -> all four devices

  `found` is a fingerprint, and `first` is the result of `first_replicas`. Returns the indices of
  the arrays whose replicas differ, and the places of the devices whose replica differs from all
  other replicas. If there is no such device, returns the places of all devices with these shards.
  Both lists are empty if all replicas are equal.
  """
  differ = found != np.take_along_axis(found, first, axis=0)
  alone, concerned = np.zeros(len(first), bool), np.zeros(len(first), bool)
  arrays = np.flatnonzero(differ.any(0)).tolist()
  for i in arrays:
    for place in np.unique(first[differ[:, i], i]):
      replicas = np.flatnonzero(first[:, i] == place)
      digests = found[replicas, i]
      concerned[replicas] = True
      alone[replicas] |= (digests[:, None] == digests).sum(0) == 1  # 1: only equal to itself.
  return arrays, np.flatnonzero(alone if alone.any() else concerned).tolist()
