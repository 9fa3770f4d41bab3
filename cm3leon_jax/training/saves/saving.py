"""Decides when the training of a decoder saves, and checks the state before each save."""

import dataclasses
from typing import Any

from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.training.faults.preemption import StopSignal
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.step.numerics import check_finite
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.watch.heldout import HeldoutLosses
from cm3leon_jax.training.watch.monitor import Monitor
from cm3leon_jax.weights.checkpoint import Checkpoints

REMEDY = "lower optimizer.learning_rate in a new --workdir; earlier checkpoints are unchanged."


@dataclasses.dataclass
class Saves(Hook):
  """Saves every `checkpoint_every` steps, after the last step, and at SIGTERM and Ctrl-C.

  With `patience`, it also saves at each evaluation with a new lowest held-out loss.

  Attributes:
    checkpoints: receives the state; closed at the end.
    stop: hook that handles signals; must precede this hook in the list of hooks.
    heldout: hook with the losses that decide which checkpoints are the best; must precede this
      hook.
    next_row: first row that no step has read yet.
    saved: step of the newest checkpoint, or 0.
  """

  checkpoints: Checkpoints
  config: TrainConfig
  monitor: Monitor
  stop: StopSignal
  heldout: HeldoutLosses
  next_row: int
  saved: int = 0

  def begin(self, state: TrainState) -> None:
    self.saved = int(state.step)

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`. Raises TryAgain if the save that runs in the background has failed."""
    self.next_row += self.config.global_batch_size
    last = step == self.config.steps or self.stop.code is not None or self.heldout.stops()
    best = self.heldout.best if self.config.patience else None
    is_best = best is not None and best[0] == step
    if (last or is_best or step % self.config.checkpoint_every == 0) and self._must_save(step):
      with self.monitor.phase("save", step):
        check_finite(state, f"checkpoint {step}", REMEDY)
        losses = self.heldout.losses  # With `keep_best`, these are the losses of this step.
        loss = losses["heldout_loss"] if losses else None
        if self.config.patience:  # No other checkpoint may replace the best one.
          loss = best[1] if best and is_best else None
        self.checkpoints.save(state, step, self.next_row, loss, best)
      self.saved = step
    self.checkpoints.check_save()

  def end(self, state: TrainState) -> None:
    with self.monitor.phase("save", int(state.step)):
      self.checkpoints.close()

  def _must_save(self, step: int) -> bool:
    """Returns whether to save at a step where a checkpoint is due.

    Skipped steps do not change the parameters, so no checkpoint is saved after a skipped step.
    There are two exceptions: the last step of the run; and a signal or `heldout.stops()`, if a step
    since the newest checkpoint was not skipped.
    """
    skipped, stops = self.monitor.skipped_in_a_row(), self.stop.code is not None
    taken = (stops or self.heldout.stops()) and skipped < step - self.saved
    return step == self.config.steps or not skipped or taken
