"""Computes the held-out losses of a run."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
from jax.sharding import NamedSharding
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.data.rows.loader import RowLoader, batches
from cm3leon_jax.run import base_documents
from cm3leon_jax.training.faults.preemption import StopSignal
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.step import loss
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import Steps
from cm3leon_jax.training.watch.monitor import Monitor

OF_PARENT = f"heldout_loss/{base_documents.NAME}"  # Loss of the base's documents.
OF_PAIRS = "heldout_loss/pairs"


def decisive(losses: Mapping[str, Any]) -> str:
  """Returns the name of the held-out loss by which the best step is chosen.

  It is the loss of image codes, or of all tokens if there are no codes. In a tuning, it is the loss
  of the run's own pairs, without the base's documents.
  """
  if OF_PARENT in losses and OF_PAIRS in losses:
    return OF_PAIRS
  return "heldout_image_loss" if losses.get("heldout_image_loss") else "heldout_loss"


def heldout_batches(heldout: RowLoader, config: TrainConfig, sharding: NamedSharding) -> list[dict]:
  """Reads the rows of `eval_batches` global batches, divided into micro-batches."""
  count = config.eval_batches * config.gradient_accumulation_steps
  return list(itertools.islice(batches(heldout, 0, config.micro_batch_size, sharding), count))


def evaluate(
  steps: Steps, eval_batches: list[dict], sources: Sequence[str], params: dict
) -> dict[str, float]:
  """Computes held-out losses by modality and source, in nats per target.

  `eval_batches` is the result of `heldout_batches`. `sources` are the names of the sources of its
  rows.
  """
  measure = functools.partial(steps.evaluate, num_sources=len(sources))
  totals = [jax.device_get(measure(params, batch)) for batch in eval_batches]
  sums = {name: np.sum([t[name] for t in totals], 0, np.float64) for name in totals[0]}
  losses = {**loss.modality_losses(sums), **loss.source_losses(sources, sums)}
  return {f"heldout_{name}": float(value) for name, value in losses.items()}


@dataclasses.dataclass
class HeldoutLosses(Hook):
  """Computes and logs held-out losses every `eval_every` steps, and after the last step.

  Attributes:
    evaluate: parameters -> losses, see `evaluate`.
    stop: hook that handles signals; must precede this hook in the list of hooks.
    evaluate_start: whether step 0 is evaluated, too.
    newest: step of the restored checkpoint; None: a new run.
    losses: the newest losses; None before the first evaluation.
    at_start: losses of step 0; {} if step 0 is not evaluated.
    forgets: whether the loss of the base's documents has risen by more than `max_forgetting`. The
      training then ends.
    best: step with the lowest loss, see `decisive`, and this loss. Evaluations because of a signal
      do not count, since an uninterrupted run has none.
    overfits: whether `patience` evaluations since `best` had a higher loss. The training then ends.
  """

  evaluate: Callable[[dict], dict[str, float]]
  config: TrainConfig
  monitor: Monitor
  stop: StopSignal
  evaluate_start: bool = False
  newest: int | None = None
  losses: dict[str, float] | None = None
  at_start: dict[str, float] = dataclasses.field(default_factory=dict)
  forgets: bool = False
  best: tuple[int, float] | None = None
  overfits: bool = False

  def begin(self, state: TrainState) -> None:
    """See `Hook`. A resumed run reads the losses of step 0 from its log."""
    self._check_patience(int(state.step))
    if self.evaluate_start and self.newest is None:
      self.at_start = self._log(0, state)
    elif self.evaluate_start:
      # Only the first process reads the log.
      self.at_start = distributed.gather(self.monitor.logged_heldout(0))[0]

  def after(self, step: int, state: TrainState, metrics: dict) -> None:
    planned = step % self.config.eval_every == 0 or step == self.config.steps
    if planned or self.stop.code is not None:
      self.losses = self._log(step, state)
      self.forgets = self.risen() > (self.config.max_forgetting or np.inf)
      loss = self.losses[decisive(self.losses)]
      # After a skipped step nothing is saved, so it cannot be the best.
      if planned and loss <= (self.best or (0, np.inf))[1] and not self.monitor.skipped_in_a_row():
        self.best = (step, loss)
      self._check_patience(step)

  def _check_patience(self, step: int) -> None:
    every, patience = self.config.eval_every, self.config.patience
    if self.best and patience and step < self.config.steps:
      self.overfits = step // every - self.best[0] // every >= patience

  def risen(self) -> float:
    """Returns by what share the loss of the base's documents has risen; 0 if it is unknown."""
    losses = [part[OF_PARENT] for part in (self.at_start, self.losses or {}) if OF_PARENT in part]
    return losses[1] / losses[0] - 1 if len(losses) == 2 else 0.0

  def stops(self) -> bool:
    return self.forgets or self.overfits

  def _log(self, step: int, state: TrainState) -> dict[str, float]:
    with self.monitor.phase("evaluate", step):
      losses = self.evaluate(state.eval_params)
      self.monitor.heldout(step, losses)
    return losses
