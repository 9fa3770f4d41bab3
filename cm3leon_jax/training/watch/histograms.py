"""Shows histograms of the parameters while a run trains."""

from cm3leon_jax.training.hooks import Hook
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.watch.monitor import Monitor


class Histograms(Hook):
  """Shows a histogram of each parameter every `every` steps; 0: never."""

  def __init__(self, every: int, monitor: Monitor):
    self._every, self._monitor = every, monitor

  def after(self, step: int, state: TrainState, metrics: dict) -> None:
    if self._every and step % self._every == 0:
      self._monitor.histograms(step, state.params)
