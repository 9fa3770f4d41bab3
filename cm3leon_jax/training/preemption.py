"""SIGTERM: a run saves before it stops, on all processes at the same step."""

import signal
import sys

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from cm3leon_jax import distributed

INTERRUPTED = 75  # Exit code of a run that saved and stopped at SIGTERM (EX_TEMPFAIL: try again).

_largest = jax.jit(jnp.max)


class StopSignal:
  """Sets a flag at SIGTERM, so that the loop can save before it ends (preemption, a scheduler).

  Only some processes may get the signal. So after each step the maximum of all flags is started as
  one all-reduce of a scalar, and it is read after the next step, without waiting. All processes
  read the same number at the same step, which is at most two after the signal.

  (JAX has `multihost_utils.reached_preemption_sync_point` for this. It agrees on the largest step
  that a process has named. But Orbax also names old steps, from the thread in which a save ends, so
  the agreed step may have passed.)
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
    """Returns whether to stop after this step; all processes call it once a step and agree."""
    if jax.process_count() == 1:
      return self.received
    mine = np.full(self._shape, self.received, np.int32)
    flags = jax.make_array_from_callback(self._shape, self._sharding, lambda index: mine[index])
    before, self._pending = self._pending, _largest(flags)
    return before is not None and bool(before)


def check_end(step: int, steps: int, folder: epath.Path) -> None:
  """Exits with `INTERRUPTED` if the run stopped before its last step."""
  if step < steps:
    distributed.print_once(
      f"stopped at step {step} of {steps}; saved in {folder}: the same command continues."
    )
    sys.exit(INTERRUPTED)
  if step > steps:
    distributed.print_once(
      f"train: the run is at step {step} already, beyond train.steps = {steps}; "
      "nothing was trained."
    )
