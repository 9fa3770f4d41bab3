"""Logs the metrics of a small training to metrics.jsonl, and shows them."""

from collections.abc import Callable
import dataclasses
from typing import Any

from cm3leon_jax.config import UserError
from cm3leon_jax.training.hooks import Hook
from cm3leon_jax.training.step.numerics import finite_values
from cm3leon_jax.training.watch.metrics import MetricsLog


@dataclasses.dataclass
class Lines(Hook):
  """Checks and logs the metrics of every `every`-th step and of the last step.

  Attributes:
    name: section of the config, for messages.
    remedy: what the user can do if a metric is not finite.
    values: metrics of the newest step; None: the step is not logged.
  """

  log: MetricsLog
  every: int
  steps: int
  name: str
  remedy: str
  values: dict[str, float] | None = None

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`. Raises UserError if a metric is not finite."""
    self.values = None
    if step % self.every and step != self.steps:
      return
    values = {key: float(value) for key, value in metrics.items()}
    if finite_values(values) != values:
      shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
      raise UserError(f"{self.name}: step {step} has {shown}: {self.remedy}")
    self.log.write(step, values)
    self.values = values

  def end(self, state: Any) -> None:
    self.log.flush()


class ShownLines(Hook):
  """Calls `show(step, values)` after each line is logged."""

  def __init__(self, lines: Lines, show: Callable[[int, dict[str, float]], None]):
    self._lines, self._show = lines, show

  def after(self, step: int, state: Any, metrics: dict) -> None:
    if self._lines.values is not None:
      self._show(step, self._lines.values)
