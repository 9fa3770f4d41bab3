"""Handles SIGTERM and Ctrl-C: the run saves, and all processes stop after the same step."""

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
from cm3leon_jax.errors import CTRL_C, INTERRUPTED
from cm3leon_jax.training.loop import Hook

# Signals and their exit codes. All processes agree on the largest index, so that SIGTERM overrides
# Ctrl-C.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CODES = (CTRL_C, INTERRUPTED)

_largest = jax.jit(jnp.max)


class StopSignal(Hook):
  """Records SIGTERM and Ctrl-C, so that the training loop can save before it ends.

  The signal may reach only some processes. After each step, all processes start an all-reduce that
  computes the maximum of their flags. They read the result after the next step, so they do not wait
  for it. Thus all processes read the same number at the same step, at most two steps after the
  signal. A second Ctrl-C stops the process immediately.

  JAX has `multihost_utils.reached_preemption_sync_point` for this purpose. It chooses the largest
  step for which a process has called it. But Orbax also calls it for old steps, from the thread
  that finishes a save, so the chosen step may already be over.

  `code` is the exit code with which to stop after the newest step; None: continue.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._sharding = NamedSharding(mesh, P(mesh.axis_names))
    self._shape = (mesh.size,)
    self._pending: jax.Array | None = None
    self.code: int | None = None

  def __enter__(self) -> "StopSignal":
    self._received = 0  # 0: none, else 1 + index in SIGNALS.
    # A script's background job ignores Ctrl-C, which is for the foreground job. Keep it ignored.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    self._previous = {number: signal.signal(number, self._set) for number in heard}
    if code := distributed.asked_to_stop():  # The signal came before this handler existed.
      self._received = max(self._received, 1 + CODES.index(code))
    return self

  def _set(self, number: int, _: object) -> None:
    before, self._received = self._received, max(self._received, 1 + SIGNALS.index(number))
    if number == signal.SIGINT:
      if before:
        raise KeyboardInterrupt
      # A signal handler must not call `print`, which it may have interrupted.
      os.write(2, b"\nCtrl-C: the run saves after this step; once more stops it at once.\n")

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`. Sets `code`; a later signal takes effect at the next step."""
    agreed = self._received
    if jax.process_count() > 1:
      mine = np.full(self._shape, self._received, np.int32)
      flags = jax.make_array_from_callback(self._shape, self._sharding, lambda index: mine[index])
      before, self._pending = self._pending, _largest(flags)
      agreed = 0 if before is None else int(before)
    self.code = CODES[agreed - 1] if agreed else None

  def stops(self) -> bool:
    return self.code is not None


def check_end(step: int, steps: int, folder: epath.Path, code: int | None, saved: int) -> None:
  """Exits with `code` if a signal stopped the run. `saved` is the newest checkpoint's step."""
  if code is not None and step < steps:
    where = f"saved in {folder}"
    if saved < step:
      where = f"all steps since {saved} were skipped, so there was nothing to save in {folder}"
    distributed.print_once(
      f"stopped at step {step} of {steps}; {where}: the same command continues."
    )
    sys.exit(code)
  if step > steps:
    distributed.print_once(
      f"train: the run is already at step {step}, beyond train.steps = {steps}; "
      "nothing was trained."
    )
