"""Decides when a small training saves, and shows the saved states."""

from collections.abc import Callable
import dataclasses
from typing import Any

from cm3leon_jax.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.training.faults.preemption import StopSignal
from cm3leon_jax.training.hooks import Hook
from cm3leon_jax.training.step.numerics import check_finite
from cm3leon_jax.training.watch.metrics import MetricsLog


@dataclasses.dataclass
class SmallSaves(Hook):
  """Saves every `checkpoint_every` steps, after the last step, and at SIGTERM and Ctrl-C.

  The last step is saved, because the stage may still be stopped before it is finished.

  Attributes:
    checkpoints: receives the state; closed at the end.
    log: metrics.jsonl of the training. Its digest is stored before each save.
    stop: must precede this hook in the list of hooks.
    name: section of the config, for messages.
    remedy: what the user can do if the state is not finite.
    saved: step of the newest checkpoint, or 0.
  """

  checkpoints: Checkpoints
  log: MetricsLog
  stop: StopSignal
  name: str
  config: Any
  remedy: str
  saved: int

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`. Raises UserError if the state is not finite."""
    last = step == self.config.steps
    if step % self.config.checkpoint_every == 0 or last or self.stop.code is not None:
      what = "the model" if last else f"checkpoint {step}"
      check_finite(state, f"{self.name}: {what}", self.remedy)
      self.log.seal()
      self.checkpoints.save(state, step, next_row=step * self.config.batch_size)
      self.saved = step

  def end(self, state: Any) -> None:
    self.checkpoints.close()


class ShownSaves(Hook):
  """Calls `show(step, state)` after each save, except when a signal stops the training."""

  def __init__(self, saves: SmallSaves, show: Callable[[int, Any], None]):
    self._saves, self._show = saves, show

  def after(self, step: int, state: Any, metrics: dict) -> None:
    if self._saves.saved == step and self._saves.stop.code is None:
      self._show(step, state)
