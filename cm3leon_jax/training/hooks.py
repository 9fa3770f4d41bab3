"""The protocol of the hooks of `loop.run_steps`: what happens around the steps of a training."""

from typing import Any


class Hook:
  """One thing that happens around the steps of a training; here, nothing.

  All processes of a job have the same hooks in the same order, because some exchange numbers. A
  hook that must also be closed at an error is a context manager around the loop.
  """

  def begin(self, state: Any) -> None:
    """Is called once, with the state before the first step."""

  def before(self, step: int) -> None:
    """Is called before the batch of `step` is read."""

  def ready(self, step: int) -> None:
    """Is called once the batch is read, before `step` is taken."""

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """Is called once `step` is dispatched; devices may still compute its state and metrics."""

  def stops(self) -> bool:
    """Returns whether the step just taken is the last one, although others were planned."""
    return False

  def end(self, state: Any) -> None:
    """Is called once, with the last state, also if a hook has stopped the training."""
