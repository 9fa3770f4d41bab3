import pytest

from cm3leon_jax.training.watch.histograms import Histograms
from tests.training.fakes import FakeMonitor, FakeState


@pytest.mark.parametrize(("every", "shown"), [(0, []), (2, [2, 4]), (5, [5])])
def test_histograms_are_those_of_the_parameters_every_few_steps(every, shown):
  monitor = FakeMonitor()
  hook = Histograms(every, monitor)
  for step in range(1, 6):
    hook.after(step, FakeState(step), {})
  assert monitor.events == [(step, "params") for step in shown]
