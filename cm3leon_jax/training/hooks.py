"""Defines the hooks that `loop.run_steps` calls around each training step."""

from typing import Any


class Hook:
  """Base class of hooks. Its methods do nothing.

  All processes of a job have the same hooks in the same order, because some hooks communicate
  between processes. A hook that must be closed even after an error is also a context manager, which
  is entered around the loop.
  """

  def begin(self, state: Any) -> None:
    """Called once, with the state before the first step."""

  def before(self, step: int) -> None:
    """Called before the batch of `step` is read."""

  def ready(self, step: int) -> None:
    """Called after the batch is read and before `step` is taken."""

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """Called after `step` is dispatched. Devices may still compute its state and metrics."""

  def stops(self) -> bool:
    """Returns whether training stops after the current step, before the planned last step."""
    return False

  def end(self, state: Any) -> None:
    """Called once with the last state, even if a hook has stopped the training."""
