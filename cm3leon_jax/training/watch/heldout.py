"""The held-out losses of a run."""

from collections.abc import Callable, Sequence
import functools
import itertools

import jax
import numpy as np

from cm3leon_jax.data.rows.loader import RowLoader, batches
from cm3leon_jax.training.config import TrainConfig
from cm3leon_jax.training.step import loss
from cm3leon_jax.training.steps import Steps
from cm3leon_jax.training.watch.monitor import Monitor


def heldout_batches(heldout: RowLoader, config: TrainConfig, sharding) -> list:
  """Reads the rows of `eval_batches` global batches, in batches of the micro-batch size."""
  count = config.eval_batches * config.gradient_accumulation_steps
  return list(itertools.islice(batches(heldout, 0, config.micro_batch_size, sharding), count))


def evaluate(
  steps: Steps, params, eval_batches: list, sources: Sequence[str] = ()
) -> dict[str, float]:
  """Computes the held-out losses by modality, nats per target of the documents themselves.

  Args:
    steps: of the run.
    params: that are evaluated.
    eval_batches: of `heldout_batches`.
    sources: names of the sources that the rows are marked with, whose losses are added.
  """
  measure = functools.partial(steps.evaluate, num_sources=len(sources))
  totals = [jax.device_get(measure(params, batch)) for batch in eval_batches]
  sums = {name: np.sum([t[name] for t in totals], 0, np.float64) for name in totals[0]}
  losses = {**loss.modality_losses(sums), **loss.source_losses(sources, sums)}
  return {f"heldout_{name}": float(value) for name, value in losses.items()}


def evaluator(
  steps: Steps, heldout: RowLoader, config: TrainConfig, sharding
) -> Callable[[dict], dict[str, float]]:
  """Reads the held-out rows, and returns a function params -> losses, see `evaluate`."""
  eval_batches = heldout_batches(heldout, config, sharding)
  return lambda params: evaluate(steps, params, eval_batches, heldout.source_names)


def losses_at_start(
  state, newest: int | None, heldout_losses: Callable, monitor: Monitor
) -> dict[str, float]:
  """Computes and logs the held-out losses of step 0; a continued run reads them from its log."""
  if newest is not None:
    return monitor.logged_heldout(0)
  with monitor.phase("evaluate", 0):
    losses = heldout_losses(state.eval_params)
    monitor.heldout(0, losses)
  return losses
