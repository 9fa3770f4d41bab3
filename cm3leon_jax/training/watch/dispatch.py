"""What the monitor counts of a step until it is dispatched."""

import contextlib
from typing import Any

from cm3leon_jax.training.hooks import Hook
from cm3leon_jax.training.watch.monitor import Monitor


class Dispatch(Hook):
  """Counts the waits for batches and traces the chosen steps, each until it is dispatched.

  As a context manager around the loop it ends the traced step at an error in it.
  """

  def __init__(self, monitor: Monitor):
    self._monitor = monitor
    self._traced, self._wait = contextlib.ExitStack(), contextlib.ExitStack()

  def __enter__(self) -> "Dispatch":
    return self

  def __exit__(self, *_: object) -> None:
    self._traced.close()

  def before(self, step: int) -> None:
    """See `Hook`."""
    self._traced.enter_context(self._monitor.traced(step))
    self._wait.enter_context(self._monitor.overlapped("data"))

  def ready(self, step: int) -> None:
    """See `Hook`."""
    self._wait.close()

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`."""
    self._traced.close()
