"""SIGTERM and Ctrl-C: a run saves before it stops, on all processes at the same step."""

import os
import signal
import sys
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.config import CTRL_C, INTERRUPTED
from cm3leon_jax.training.hooks import Hook

# Signals and their exit codes. All processes agree on the largest place, so the later one counts.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CODES = (CTRL_C, INTERRUPTED)

_largest = jax.jit(jnp.max)


class StopSignal(Hook):
  """Notes SIGTERM and Ctrl-C, so that the loop can save before it ends.

  Only some processes may get the signal. So after each step the maximum of all flags is started as
  one all-reduce of a scalar, and it is read after the next step, without waiting. All processes
  read the same number at the same step, which is at most two after the signal. A second Ctrl-C
  stops at once.

  (JAX has `multihost_utils.reached_preemption_sync_point` for this. It agrees on the largest step
  that a process has named. But Orbax also names old steps, from the thread in which a save ends, so
  the agreed step may have passed.)

  Attributes:
    code: with which to exit after the newest step; None: go on.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._sharding = NamedSharding(mesh, P(mesh.axis_names))
    self._shape = (mesh.size,)
    self._pending: jax.Array | None = None
    self.code: int | None = None

  def __enter__(self) -> "StopSignal":
    self._received = 0  # 1 + place in SIGNALS.
    # A job in the background of a script ignores Ctrl-C, which is meant for the foreground.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    self._previous = {number: signal.signal(number, self._set) for number in heard}
    if code := distributed.asked_to_stop():  # Just before, in a job of several processes.
      self._received = max(self._received, 1 + CODES.index(code))
    return self

  def _set(self, number: int, _: object) -> None:
    before, self._received = self._received, max(self._received, 1 + SIGNALS.index(number))
    if number == signal.SIGINT:
      if before:
        raise KeyboardInterrupt
      # A handler must not print: it may have interrupted a print.
      os.write(2, b"\nCtrl-C: the run saves after this step; once more stops it at once.\n")

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`. The flags are read once: a later signal counts at the next step."""
    self.code = self.stopping()

  def stops(self) -> bool:
    """See `Hook`."""
    return self.code is not None

  def stopping(self) -> int | None:
    """Returns the exit code with which to stop after this step; None: go on.

    All processes call it once a step and agree.
    """
    agreed = self._received if jax.process_count() == 1 else self._largest_of_all()
    return CODES[agreed - 1] if agreed else None

  def _largest_of_all(self) -> int:
    mine = np.full(self._shape, self._received, np.int32)
    flags = jax.make_array_from_callback(self._shape, self._sharding, lambda index: mine[index])
    before, self._pending = self._pending, _largest(flags)
    return 0 if before is None else int(before)


def check_end(step: int, steps: int, folder: epath.Path, code: int | None, saved: int) -> None:
  """Exits with `code` if the run was asked to stop before its last step.

  Args:
    step: that the run has reached.
    steps: of the whole run.
    folder: of the run.
    code: of the exit; None: it was not asked to stop.
    saved: step of the newest checkpoint.
  """
  if code is not None and step < steps:
    where = f"saved in {folder}"
    if saved < step:
      where = f"all steps since {saved} were skipped, so nothing was to be saved in {folder}"
    distributed.print_once(
      f"stopped at step {step} of {steps}; {where}: the same command continues."
    )
    sys.exit(code)
  if step > steps:
    distributed.print_once(
      f"train: the run is at step {step} already, beyond train.steps = {steps}; "
      "nothing was trained."
    )
