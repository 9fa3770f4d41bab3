"""Defines the hooks of a small training: they log metrics, save states, and show both."""

from collections.abc import Callable
import dataclasses
from typing import Any

from cm3leon_jax.errors import UserError
from cm3leon_jax.training.faults.preemption import StopSignal
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.step.numerics import check_finite, finite_values
from cm3leon_jax.training.watch.metrics import MetricsLog
from cm3leon_jax.weights.checkpoint import Checkpoints


@dataclasses.dataclass
class Lines(Hook):
  """Checks, logs and shows the metrics of every `every`-th step and of the last step.

  Attributes:
    name: section of the config, for messages.
    remedy: end of the message about a metric that is not finite; says what to do.
    show: called with a step and its metrics after they are logged.
  """

  log: MetricsLog
  every: int
  steps: int
  name: str
  remedy: str
  show: Callable[[int, dict[str, float]], None]

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`. Raises UserError if a metric is not finite."""
    if step % self.every and step != self.steps:
      return
    values = {key: float(value) for key, value in metrics.items()}
    if finite_values(values) != values:
      shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
      raise UserError(f"{self.name}: step {step} has {shown}: {self.remedy}")
    self.log.write(step, values)
    self.show(step, values)

  def end(self, state: Any) -> None:
    self.log.flush()


@dataclasses.dataclass
class SmallSaves(Hook):
  """Saves every `checkpoint_every` steps, after the last step, and at SIGTERM and Ctrl-C.

  The last step is saved, because the stage may still be stopped before it is finished.

  Attributes:
    checkpoints: receives the state; closed at the end.
    stop: hook that handles signals; must precede this hook in the list of hooks.
    name: section of the config, for messages.
    remedy: end of the message about a state that is not finite; says what to do.
    saved: step of the newest checkpoint, or 0.
    show: called with a step and its state after a save, except when a signal stops the training;
      None: saved states are not shown.
  """

  checkpoints: Checkpoints
  stop: StopSignal
  name: str
  config: Any
  remedy: str
  saved: int
  show: Callable[[int, Any], None] | None

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`.

    Raises:
      UserError: the state is not finite.
      TryAgain: the save that runs in the background has failed.
    """
    last = step == self.config.steps
    if step % self.config.checkpoint_every == 0 or last or self.stop.code is not None:
      what = "the model" if last else f"checkpoint {step}"
      check_finite(state, f"{self.name}: {what}", self.remedy)
      self.checkpoints.save(state, step, next_row=step * self.config.batch_size)
      self.saved = step
      if self.show is not None and self.stop.code is None:
        self.show(step, state)
    self.checkpoints.check_save()

  def end(self, state: Any) -> None:
    self.checkpoints.close()
