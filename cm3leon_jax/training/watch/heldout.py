"""Computes the held-out losses of a run."""

from collections.abc import Callable, Sequence
import functools
import itertools

import jax
from jax.sharding import NamedSharding
import numpy as np

from cm3leon_jax.data.rows.loader import RowLoader, batches
from cm3leon_jax.training.config import TrainConfig
from cm3leon_jax.training.faults.preemption import StopSignal
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.step import loss
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import Steps
from cm3leon_jax.training.watch.monitor import Monitor


def heldout_batches(heldout: RowLoader, config: TrainConfig, sharding: NamedSharding) -> list[dict]:
  """Reads the rows of `eval_batches` global batches, divided into micro-batches."""
  count = config.eval_batches * config.gradient_accumulation_steps
  return list(itertools.islice(batches(heldout, 0, config.micro_batch_size, sharding), count))


def evaluate(
  steps: Steps, params: dict, eval_batches: list[dict], sources: Sequence[str] = ()
) -> dict[str, float]:
  """Computes held-out losses by modality and source, in nats per target.

  `eval_batches` is the result of `heldout_batches`.
  """
  measure = functools.partial(steps.evaluate, num_sources=len(sources))
  totals = [jax.device_get(measure(params, batch)) for batch in eval_batches]
  sums = {name: np.sum([t[name] for t in totals], 0, np.float64) for name in totals[0]}
  losses = {**loss.modality_losses(sums), **loss.source_losses(sources, sums)}
  return {f"heldout_{name}": float(value) for name, value in losses.items()}


def evaluator(
  steps: Steps, heldout: RowLoader, config: TrainConfig, sharding: NamedSharding
) -> Callable[[dict], dict[str, float]]:
  """Reads the held-out rows and returns a function params -> losses, see `evaluate`."""
  eval_batches = heldout_batches(heldout, config, sharding)
  return lambda params: evaluate(steps, params, eval_batches, heldout.source_names)


class HeldoutLosses(Hook):
  """Computes and logs held-out losses every `eval_every` steps, and after the last step.

  Attributes:
    losses: the newest losses; None: no step was evaluated yet.
    at_start: losses of step 0; {} if step 0 is not evaluated.
  """

  def __init__(
    self,
    evaluate_params: Callable[[dict], dict[str, float]],
    config: TrainConfig,
    monitor: Monitor,
    stop: StopSignal,
    evaluate_start: bool = False,
    newest: int | None = None,
  ):
    """Creates the hook.

    Args:
      evaluate_params: result of `evaluator`.
      stop: must precede this hook in the list of hooks.
      newest: step of the restored checkpoint; None: a new run.
    """
    self._evaluate, self._config, self._monitor, self._stop = evaluate_params, config, monitor, stop
    self._evaluate_start, self._newest = evaluate_start, newest
    self.losses: dict[str, float] | None = None
    self.at_start: dict[str, float] = {}

  def begin(self, state: TrainState) -> None:
    """See `Hook`. A continued run reads the losses of step 0 from its log."""
    if not self._evaluate_start:
      return
    if self._newest is not None:
      self.at_start = self._monitor.logged_heldout(0)
    else:
      self.at_start = self._log(0, state)

  def after(self, step: int, state: TrainState, metrics: dict) -> None:
    last = step == self._config.steps or self._stop.code is not None
    if step % self._config.eval_every == 0 or last:
      self.losses = self._log(step, state)

  def _log(self, step: int, state: TrainState) -> dict[str, float]:
    with self._monitor.phase("evaluate", step):
      losses = self._evaluate(state.eval_params)
      self._monitor.heldout(step, losses)
    return losses
