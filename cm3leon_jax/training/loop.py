"""Runs the training loop of the decoder, the image tokenizer and CLIP."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cm3leon_jax.training.hooks import Hook


def run_steps(
  steps: Iterable[int], take_step: Callable, state: Any, batches: Iterator, hooks: Sequence[Hook]
) -> Any:
  """Takes all steps, or stops earlier if a hook asks for it. Returns the last state.

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
