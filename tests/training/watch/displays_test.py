import pytest

from cm3leon_jax.training.config import TrainConfig
from cm3leon_jax.training.watch.displays import Histograms, SampleGrids
from tests.training.fakes import FakeMonitor, FakeState

CONFIG = TrainConfig(steps=7, sample_every=3)


def test_grids_are_made_every_few_steps_and_of_the_last_one():
  monitor = FakeMonitor()
  hook = SampleGrids(CONFIG, monitor, lambda params, step: f"grid of the {params}, {step}")
  for step in range(1, 8):
    hook.after(step, FakeState(step), {})
  assert monitor.events == [
    part
    for step in (3, 6, 7)
    for part in (f"sample {step}", (step, f"grid of the average, {step}"), "end")
  ]


def test_without_a_function_there_are_no_grids():
  monitor = FakeMonitor()
  SampleGrids(CONFIG, monitor, None).after(7, FakeState(7), {})
  assert monitor.events == []


@pytest.mark.parametrize(("every", "shown"), [(0, []), (2, [2, 4]), (5, [5])])
def test_histograms_are_those_of_the_parameters_every_few_steps(every, shown):
  monitor = FakeMonitor()
  hook = Histograms(every, monitor)
  for step in range(1, 6):
    hook.after(step, FakeState(step), {})
  assert monitor.events == [(step, "params") for step in shown]
