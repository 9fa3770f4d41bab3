"""Shows grids of samples and histograms of the parameters while a run trains."""

from collections.abc import Callable
import dataclasses

from PIL import Image

from cm3leon_jax.training.config import TrainConfig
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.watch.monitor import Monitor


@dataclasses.dataclass
class SampleGrids(Hook):
  """Makes a grid of samples every `sample_every` steps and after the last step of the run.

  `sample_grid` maps (params, step) to a PIL image or None. If `sample_grid` is None, no grids are
  made.
  """

  config: TrainConfig
  monitor: Monitor
  sample_grid: Callable[[dict, int], Image.Image | None] | None

  def after(self, step: int, state: TrainState, metrics: dict) -> None:
    if self.sample_grid is None:
      return
    if step % self.config.sample_every == 0 or step == self.config.steps:
      with self.monitor.phase("sample", step):
        self.monitor.samples(step, self.sample_grid(state.eval_params, step))


class Histograms(Hook):
  """Shows a histogram of each parameter every `every` steps; 0: never."""

  def __init__(self, every: int, monitor: Monitor):
    self._every, self._monitor = every, monitor

  def after(self, step: int, state: TrainState, metrics: dict) -> None:
    if self._every and step % self._every == 0:
      self._monitor.histograms(step, state.params)
