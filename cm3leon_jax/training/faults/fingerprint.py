"""Computes fingerprints: a few numbers per array and device, which reveal silent errors."""

# D devices of the mesh, in the order of `mesh.devices.flat`; N arrays of a tree.

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, PyTree, UInt32
import numpy as np

from cm3leon_jax.mesh import AXES

GOLDEN = 0x9E3779B1  # Odd; its multiples spread over 32 bits (Knuth 1998, volume 3, section 6.4).


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

  Each device reads its own shard or replica, so replicas have separate entries.
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
  """Returns the number of each element, counted from 0. The compiler fuses it: no memory is used.

  shape (2, 3) -> [[0 1 2] [3 4 5]]
  """
  numbers = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :]) % 2**32
    numbers += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
  return numbers


def equal(a: Fingerprint, b: Fingerprint, tolerance: float = 0.0) -> Bool[np.ndarray, "D N"]:
  """Compares two fingerprints on the host, array by array.

  Both have numpy arrays of the same shapes. `tolerance` is the accepted difference of projections,
  as a share of the norm. With 0, digests must be equal.
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
