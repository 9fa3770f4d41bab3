"""Ends a training after a failed save."""

from typing import Any

from cm3leon_jax.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.training.hooks import Hook


class FailedSaves(Hook):
  """Ends a training after a save in the background has failed."""

  def __init__(self, checkpoints: Checkpoints):
    self._checkpoints = checkpoints

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`. Raises TryAgain if the save in flight could not be written."""
    self._checkpoints.check_save()
