"""Computes fingerprints: a few numbers per array and device that reveal silent hardware errors.

Several devices may store replicas of one shard, and these replicas must be equal. Each device adds
the same update to its replica, so an error in one replica persists. A repeated step reads the same
wrong replica and gives the same result, so only a comparison of the replicas reveals the error.
"""

# D devices of the mesh, in the order of `mesh.devices.flat`; N arrays of a tree.

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int, PyTree, UInt32
import numpy as np

from cm3leon_jax.mesh import AXES

# Odd; its multiples are spread over all 32-bit numbers (Knuth 1998, vol. 3, section 6.4).
GOLDEN = 0x9E3779B1


class Fingerprint(NamedTuple):
  """Summary of the shards of each array of a tree on each device.

  Attributes:
    digest: sum of the elements' bits, as 32-bit words, each multiplied by an odd number, modulo
      2^32. A change of one word always changes the digest.
    projection: sum of the elements, each multiplied by a random sign. Small rounding errors change
      it little.
    norm: square root of the sum of squares.
  """

  digest: UInt32[Array, "D N"] | UInt32[np.ndarray, "D N"]
  projection: Float32[Array, "D N"] | Float32[np.ndarray, "D N"]
  norm: Float32[Array, "D N"] | Float32[np.ndarray, "D N"]


def fingerprint(tree: PyTree) -> Fingerprint:
  """Computes the fingerprint of a tree of arrays under jit. The result is replicated.

  Each device reads its own shard or replica, so each replica has its own entry.
  """
  leaves = jax.tree.leaves(tree)
  specs = [jax.typeof(x).sharding.spec for x in leaves]
  parts = jax.shard_map(
    lambda xs: Fingerprint(*(jnp.stack(x)[None] for x in zip(*map(_of_array, xs)))),
    in_specs=(specs,),
    out_specs=jax.P(AXES, None),
    check_vma=False,
  )(leaves)
  return jax.tree.map(lambda x: jax.sharding.reshard(x, jax.P(None, None)), parts)


def _of_array(x: Array) -> Fingerprint:
  """Computes the scalars digest, projection and norm of an array on one device."""
  hashed = _numbers(x.shape) * jnp.uint32(GOLDEN)
  signs = jnp.where(hashed >> 31 == 1, jnp.float32(1), jnp.float32(-1))
  values = x.astype(jnp.float32)
  return Fingerprint(
    jnp.sum(_words(x) * (hashed | 1), dtype=jnp.uint32),
    jnp.sum(values * signs),
    jnp.sqrt(jnp.sum(values * values)),
  )


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


def equal(a: Fingerprint, b: Fingerprint, tolerance: float = 0.0) -> Bool[np.ndarray, "D N"]:
  """Returns, for each device and array, whether two fingerprints are equal. Runs on the host.

  Both contain numpy arrays of the same shapes. `tolerance` is the accepted difference of the
  projections, as a share of the norm. If it is 0, the digests must be equal.
  """
  same = a.digest == b.digest
  if not tolerance:
    return same
  with np.errstate(invalid="ignore", over="ignore"):
    # Use the smaller norm, because the norm of a damaged array may be infinite.
    near = np.abs(a.projection - b.projection) <= tolerance * np.minimum(a.norm, b.norm)
  return same | near


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
  found: Fingerprint, first: Int[np.ndarray, "D N"], tolerance: float = 0.0
) -> tuple[list[int], list[int]]:
  """Compares the replicas of each shard.

    digests of an array that is replicated on 5 devices: [7 7 5 7 7] -> device 2
    of an array with two shards, each on 2 of 4 devices: [7 8 7 9] -> devices 1 and 3
    of an array that is replicated on 4 devices: [7 7 5 5] -> all four devices

  `found` contains numpy arrays, and `first` is the result of `first_replicas`. For `tolerance`, see
  `fingerprint.equal`. Returns the indices of the arrays whose replicas differ, and the places of
  the devices whose replica differs from all other replicas. If there is no such device, returns the
  places of all devices with these shards. Both lists are empty if all replicas are equal.
  """
  of_first = Fingerprint(*(np.take_along_axis(x, first, axis=0) for x in found))
  differ = ~equal(found, of_first, tolerance)
  alone, concerned = np.zeros(len(first), bool), np.zeros(len(first), bool)
  arrays = np.flatnonzero(differ.any(0)).tolist()
  for i in arrays:
    for place in np.unique(first[differ[:, i], i]):
      replicas = np.flatnonzero(first[:, i] == place)
      a, b = (Fingerprint(*(x[at, i] for x in found)) for at in np.meshgrid(replicas, replicas))
      concerned[replicas] = True
      alone[replicas] |= equal(a, b, tolerance).sum(0) == 1  # 1: only equal to itself.
  return arrays, np.flatnonzero(alone if alone.any() else concerned).tolist()
