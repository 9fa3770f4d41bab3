"""The loop of all trainings: of the decoder, the image tokenizer and CLIP."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cm3leon_jax.training.hooks import Hook


def run_steps(
  steps: Iterable[int], take_step: Callable, state: Any, batches: Iterator, hooks: Sequence[Hook]
) -> Any:
  """Takes steps, until the last one or one after which a hook stops.

  Args:
    steps: numbers of the steps, from 1 on over all starts; a range, or a progress bar over one.
    take_step: (state, batch) -> (state, metrics); it may donate the state.
    state: to continue from.
    batches: one for each step.
    hooks: called in their order around each step, see `Hook`.

  Returns:
    The last state.
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
    del batch  # Its memory is free while hooks evaluate and save.
    for hook in hooks:
      hook.after(step, state, metrics)
    if any(hook.stops() for hook in hooks):
      break
  for hook in hooks:
    hook.end(state)
  return state
