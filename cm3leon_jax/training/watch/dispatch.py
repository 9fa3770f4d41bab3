"""Measures how long steps wait for their batches, and traces steps until they are dispatched."""

import contextlib
from typing import Any

from cm3leon_jax.training.hooks import Hook
from cm3leon_jax.training.watch.monitor import Monitor


class Dispatch(Hook):
  """Measures the wait for each batch, and traces the chosen steps until they are dispatched.

  It is a context manager around the loop, so that an error in the loop also ends the traced step.
  """

  def __init__(self, monitor: Monitor):
    self._monitor = monitor
    self._traced, self._wait = contextlib.ExitStack(), contextlib.ExitStack()

  def __enter__(self) -> "Dispatch":
    return self

  def __exit__(self, *_: object) -> None:
    self._traced.close()

  def before(self, step: int) -> None:
    self._traced.enter_context(self._monitor.traced(step))
    self._wait.enter_context(self._monitor.overlapped("data"))

  def ready(self, step: int) -> None:
    self._wait.close()

  def after(self, step: int, state: Any, metrics: dict) -> None:
    self._traced.close()
