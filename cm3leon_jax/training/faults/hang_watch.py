"""Ends a run that hangs; each of its processes first prints where it waits."""

from collections.abc import Callable
import faulthandler
import os
import socket
import sys
import threading
import time
from typing import Any

import jax

from cm3leon_jax import distributed
from cm3leon_jax.errors import TryAgain
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.watch.goodput import PHASES, Stopwatch

HUNG = TryAgain.exit_code  # Launchers restart a job with this exit code a limited number of times.
# A step that takes this many times as long as the longest earlier step counts as hanging.
LONGEST = 10
# Compiling, evaluating, saving, sampling and restoring may take this multiple of a step's limit.
SLOW = 4
COMPILED = 3  # When this step begins, the first step has ended, so the steps are compiled.
POLL_SECONDS = 5.0
# Seconds that a process waits between its timeout and its exit. When it exits, the other processes
# fail; until then, they can print their stacks. Process 0, which runs JAX's service, waits twice as
# long.
LINGER_SECONDS = 10.0


class HangWatch(Hook):
  """Ends the process with exit code `HUNG` if the loop makes no progress inside a `with` block.

  A thread watches the loop. Progress means that a batch is read, a step is dispatched, or the
  Stopwatch enters a new phase. After the full time limit without progress, each process prints its
  step, its phase and the stacks of its threads. The process at the earliest step and phase is the
  one for which the others wait.

  The time limit is `minutes`, or LONGEST times the longest step so far if this is longer. The first
  steps, which compile, and phases other than steps have SLOW times this limit.
  """

  def __init__(
    self, minutes: float, watch: Stopwatch,
    end: Callable[[int], None] = os._exit, clock: Callable[[], float] = time.monotonic,
  ):  # fmt: skip
    """Creates a watch, which starts in its `with` block.

    Args:
      minutes: time limit without progress; 0 disables the watch.
      end: ends the process with an exit code. The default skips clean-up, which could hang, too.
      clock: returns the time in seconds.
    """
    self._allowed, self._stopwatch = 60 * minutes, watch
    self._end, self._clock = end, clock
    self._steps = self._taken = 0
    self._in_steps = self._longest = 0.0
    self._reading = self._warned = False
    self._sign = self._looked = clock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)

  def __enter__(self) -> "HangWatch":
    self._sign = self._looked = self._clock()
    if self._allowed:
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()

  def continue_after(self, step: int) -> None:
    """Sets the step after which the run continues. Messages show it until the next step begins."""
    self._steps = step

  def before(self, step: int) -> None:
    self._reading = True

  def ready(self, step: int) -> None:
    """See `Hook`. Measures the time of the previous step, excluding phases other than steps."""
    self._reading = False
    seconds = self._stopwatch.seconds()
    before, self._in_steps = self._in_steps, seconds["step"] + seconds["data"]
    if self._taken >= COMPILED:
      self._longest = max(self._longest, self._in_steps - before)
    self._steps = step
    self._taken += 1
    self._sign = self._clock()

  def after(self, step: int, state: Any, metrics: dict) -> None:
    self._sign = self._clock()

  def _doing(self) -> str:
    phase = self._stopwatch.standing()[0]
    return "data" if self._reading and phase == "step" else phase

  def _run(self) -> None:
    while not self._stop.wait(min(POLL_SECONDS, self._allowed / 20)):
      self.look()

  def look(self) -> None:
    """Warns or ends the run, depending on the time since the last progress."""
    now = self._clock()
    if now - self._looked > POLL_SECONDS + self._allowed / 4:
      self._sign = now  # The whole process was suspended (Ctrl-Z, a debugger).
    self._looked = now
    limit = max(self._allowed, LONGEST * self._longest)
    if self._doing() not in ("step", "data") or self._taken < COMPILED:
      limit *= SLOW
    idle = min(self._clock() - self._sign, self._stopwatch.standing()[1])
    if idle > limit:
      self._give_up(idle)
    elif idle <= limit / 2:
      self._warned = False
    elif not self._warned:
      self._warned = True
      distributed.print_once(
        f"train: warning: no progress for {idle / 60:.3g} minutes at {self._place()}; "
        f"after {limit / 60:.3g} the job ends with exit code {HUNG} (train.hang_minutes)."
      )

  def _place(self) -> str:
    """Describes where this process is, e.g. "step 41, waiting for data"."""
    return f"step {self._steps:,}, {PHASES[self._doing()]}"

  def _give_up(self, idle: float) -> None:
    process, count = jax.process_index(), jax.process_count()
    print(
      f"error: no progress for {idle / 60:.3g} minutes (train.hang_minutes): process {process} of "
      f"{count} on {socket.gethostname()} is at {self._place()}. Its threads:",
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    print(
      f"error: the job ends with exit code {HUNG}: the same command continues it.",
      file=sys.stderr,
      flush=True,
    )
    sys.stdout.flush()
    if count > 1:  # If another process exits, the loop fails, which ends this wait.
      self._stop.wait(LINGER_SECONDS * (2 if process == 0 else 1))
    self._end(HUNG)
