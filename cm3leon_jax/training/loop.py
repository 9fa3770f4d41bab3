"""Runs the training loop of the decoder, the image tokenizer and CLIP, with its hooks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


class Hook:
  """Base class of hooks. Its methods do nothing.

  All processes of a job have the same hooks in the same order, because some hooks communicate
  between processes. A hook that must be closed even after an error is also a context manager; the
  caller runs the loop in its `with` block.
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
    """Returns whether training must stop after the current step, even if it is not the last."""
    return False

  def end(self, state: Any) -> None:
    """Called once with the last state, even if a hook has stopped the training."""


def run_steps(
  steps: Iterable[int], take_step: Callable, state: Any, batches: Iterator, hooks: Sequence[Hook]
) -> Any:
  """Takes all steps, or fewer if a hook stops the training. Returns the last state.

  Args:
    steps: step numbers. The first step of a run is 1, and a resumed run continues the count. May be
      a progress bar over a range.
    take_step: (state, batch) -> (state, metrics); it may donate the state.
    hooks: called in this order around each step, see `Hook`.
  """
  for hook in hooks:
    hook.begin(state)
  for step in steps:
    for hook in hooks:
      hook.before(step)
    batch = next(batches)
    for hook in hooks:
      hook.ready(step)
    state, metrics = take_step(state, batch)
    del batch  # Free its memory before hooks evaluate and save.
    for hook in hooks:
      hook.after(step, state, metrics)
    if any(hook.stops() for hook in hooks):
      break
  for hook in hooks:
    hook.end(state)
  return state
