"""Compares replicas: devices that hold the same shard of an array must hold the same numbers.

Each device adds the same update to its replica, so an error in one replica persists. Computing a
step again does not reveal it, because the wrong numbers are read again. A comparison of the
replicas reveals it.
"""

# D devices of the mesh, in the order of `mesh.devices.flat`; N arrays of a tree.

import jax
from jax.sharding import Mesh
from jaxtyping import Int, PyTree
import numpy as np

from cm3leon_jax.training.faults.fingerprint import Fingerprint, equal


def first_replicas(tree: PyTree, mesh: Mesh) -> Int[np.ndarray, "D N"]:
  """Returns, for each device and array, the place of the first device that holds the same shard.

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

  `found` has numpy arrays, and `first` is the result of `first_replicas`. For `tolerance`, see
  `fingerprint.equal`. Returns the numbers of the arrays whose replicas differ, and places of
  devices. A device is listed if its replica is not equal to any other replica. If there is no such
  device, all devices with the differing shards are listed. Both lists are empty if all replicas are
  equal.
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
      alone[replicas] |= equal(a, b, tolerance).sum(0) == 1  # Each replica is equal to itself.
  return arrays, np.flatnonzero(alone if alone.any() else concerned).tolist()
