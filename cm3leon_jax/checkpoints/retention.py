"""Decides which checkpoints to keep, by their age, their step and their held-out loss."""

from collections.abc import Mapping
import datetime
import math
import types
from typing import Any

from orbax.checkpoint import checkpoint_managers

METRIC = "heldout_loss"


def score(metrics: Mapping[str, float]) -> float:
  """Returns the score of a checkpoint from its metrics. Higher is better; NaN scores lowest."""
  loss = metrics.get(METRIC)
  return -math.inf if loss is None or math.isnan(loss) else -loss


def policy(last: int, every: int, best: int) -> checkpoint_managers.AnyPreservationPolicy:
  """Returns the Orbax policy that keeps a checkpoint if it is new, periodic or among the best.

  Args:
    last: number of newest checkpoints to keep.
    every: checkpoints whose step is a multiple of `every` are kept; 0: none.
    best: number of checkpoints with the lowest `METRIC` to keep. Checkpoints without the metric do
      not count as best.
  """
  policies: list[Any] = [checkpoint_managers.LatestN(last)]
  if every:
    policies.append(checkpoint_managers.EveryNSteps(every))
  if best:
    policies.append(
      checkpoint_managers.BestN(get_metric_fn=score, n=best, keep_checkpoints_without_metrics=False)
    )
  return checkpoint_managers.AnyPreservationPolicy(policies)


def kept(steps: list[int], losses: Mapping[int, float], last: int, every: int, best: int) -> set:
  """Returns the steps that `policy` keeps.

  kept([1, 2, 3, 4], {1: 0.5, 2: 0.3}, last=1, every=3, best=1) -> {2, 3, 4}

  `losses` maps steps to held-out losses; steps without a loss are absent. The other arguments are
  those of `policy`.
  """
  # Orbax's policies read the attributes `step`, `metrics` and `time` of a checkpoint.
  metrics = {step: {METRIC: loss} for step, loss in losses.items()}
  found = [
    types.SimpleNamespace(step=step, metrics=metrics.get(step), time=datetime.datetime.min)
    for step in sorted(steps)
  ]
  decisions = policy(last, every, best).should_preserve(
    found, context=checkpoint_managers.PreservationContext()
  )
  return {checkpoint.step for checkpoint, keep in zip(found, decisions) if keep}
