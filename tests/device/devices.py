"""Makes meshes of one accelerator or one CPU device, and compares their results."""

import jax
import numpy as np

from cm3leon_jax.mesh import MeshConfig, create_mesh


def device_mesh():
  return create_mesh(MeshConfig(), jax.devices()[:1])


def cpu_mesh():
  return create_mesh(MeshConfig(), jax.devices("cpu")[:1])


def on_host(tree):
  return jax.tree.map(np.asarray, tree)


def error(found, expected) -> float:
  """Returns the norm of the difference divided by the norm of `expected`, over all arrays."""
  pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
  squares = [
    (np.square(np.float64(a) - np.float64(b)).sum(), np.square(np.float64(b)).sum())
    for a, b in pairs
  ]
  different, total = np.sum(squares, axis=0)
  return float(np.sqrt(different / total))
