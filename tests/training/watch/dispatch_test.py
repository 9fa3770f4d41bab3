import pytest

from cm3leon_jax.training.watch.dispatch import Dispatch
from tests.training.fakes import FakeMonitor


def test_the_wait_ends_with_the_batch_and_the_trace_with_the_dispatch():
  monitor = FakeMonitor()
  dispatch = Dispatch(monitor)
  for step in (1, 2):
    dispatch.before(step)
    dispatch.ready(step)
    monitor.events.append("step")
    dispatch.after(step, None, {})
  one = ["traced 1", "data", "end of data", "step", "end of trace"]
  assert monitor.events == [*one, "traced 2", *one[1:]]


def test_an_error_ends_the_trace_and_counts_no_wait():
  monitor = FakeMonitor()
  dispatch = Dispatch(monitor)
  dispatch.before(1)
  with pytest.raises(ZeroDivisionError), dispatch:
    raise ZeroDivisionError
  assert monitor.events == ["traced 1", "data", "end of trace"]
