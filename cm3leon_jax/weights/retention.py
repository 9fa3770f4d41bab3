"""Decides which checkpoints to keep, by their age, their step and their held-out loss."""

from collections.abc import Mapping
import math
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
