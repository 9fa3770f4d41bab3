"""Tests the loop of all trainings, with numbers as states and batches."""

import itertools

from cm3leon_jax.training.loop import Hook, run_steps
from tests.training.fakes import Noting


def add(events):
  """Returns a step function that adds the batch to the state."""

  def take_step(state, batch):
    events.append(("step", state, batch))
    return state + batch, {"loss": batch}

  return take_step


def read(events):
  for batch in itertools.count(10, 10):
    events.append(("batch", batch))
    yield batch


def test_hooks_are_called_in_their_order_around_each_step():
  events = []
  hooks = [Noting("a", events), Hook(), Noting("b", events)]
  assert run_steps(range(4, 6), add(events), 1, read(events), hooks) == 31
  step = [
    [
      *((name, "before", i) for name in "ab"),
      ("batch", batch),
      *((name, "ready", i) for name in "ab"),
      ("step", state, batch),
      *((name, "after", i, state + batch, {"loss": batch}) for name in "ab"),
    ]
    for i, state, batch in ((4, 1, 10), (5, 11, 20))
  ]
  begin, end = (
    [(name, what, state) for name in "ab"] for what, state in (("begin", 1), ("end", 31))
  )
  assert events == [*begin, *step[0], *step[1], *end]


def test_a_hook_stops_after_the_other_hooks_of_its_step():
  events = []
  hooks = [Noting("a", events), Noting("b", events, stop_after=2), Noting("c", events)]
  assert run_steps(range(1, 9), add(events), 0, read(events), hooks) == 30
  assert events[-4:] == [
    ("c", "after", 2, 30, {"loss": 20}),
    ("a", "end", 30),
    ("b", "end", 30),
    ("c", "end", 30),
  ]
  assert ("batch", 30) not in events
