"""SIGTERM: a run that is told to stop saves first, on all processes at the same step."""

import signal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

# [devices] int32 -> the largest, on every device.
_largest = jax.jit(jnp.max)


class StopSignal:
  """SIGTERM sets a flag, so that the loop can save before it ends (preemption, a scheduler's grace period).

  One process may be told and the others not. So the flags travel with the steps: their maximum over the mesh is started
  behind a step and read behind the next, when it has long been there. All read the same number at the same step, which is
  at most two after the signal; nobody waits, and it costs one all-reduce of a scalar.

  (JAX has `multihost_utils.reached_preemption_sync_point` for this. It agrees on the largest step that a process has
  named, and Orbax names old ones to it, from the thread in which a save ends: the step agreed on may be past already.)
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._sharding = NamedSharding(mesh, P(mesh.axis_names))
    self._shape = (mesh.size,)
    self._pending = None

  def __enter__(self):
    self.received = False
    self._previous = signal.signal(signal.SIGTERM, self._set)
    return self

  def _set(self, *_):
    self.received = True

  def __exit__(self, *_):
    signal.signal(signal.SIGTERM, self._previous)

  def stopping(self) -> bool:
    """Whether to stop after this step; all processes call it once a step and get the same answer."""
    if jax.process_count() == 1:
      return self.received
    mine = np.full(self._shape, self.received, np.int32)
    flags = jax.make_array_from_callback(self._shape, self._sharding, lambda index: mine[index])
    before, self._pending = self._pending, _largest(flags)
    return before is not None and bool(before)
