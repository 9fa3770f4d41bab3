"""Explains to the user which rows were read when too many consecutive steps were skipped."""

from collections.abc import Iterator
import contextlib

from etils import epath
from jax.sharding import NamedSharding

from cm3leon_jax.config import UserError
from cm3leon_jax.training.config import TrainConfig
from cm3leon_jax.training.hooks import Hook
from cm3leon_jax.training.objective import Objective
from cm3leon_jax.training.step.numerics import TooManySkippedError
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import Steps


class NewestState(Hook):
  """Remembers the state of the newest step, and where this start began.

  Attributes:
    state: state of the newest step; None before the first step.
  """

  def __init__(self, step: int, next_row: int):
    """Takes the number of steps before this start, and the first row that this start reads."""
    self._step, self._next_row = step, next_row
    self.state: TrainState | None = None

  def after(self, step: int, state: TrainState, metrics: dict) -> None:
    """See `Hook`."""
    self.state = state

  def rows_of(self, steps: range, batch_size: int) -> range:
    """Returns the rows that `steps` of this start have read.

    Steps of earlier starts may have had batches of another size.
    """
    first = self._next_row + (steps[0] - 1 - self._step) * batch_size
    return range(first, first + len(steps) * batch_size)


@contextlib.contextmanager
def explaining(
  objective: Objective, steps: Steps, newest: NewestState, config: TrainConfig,
  sharding: NamedSharding, folder: epath.Path,
) -> Iterator[None]:  # fmt: skip
  """Replaces a TooManySkippedError of the body by an error that describes the rows.

  `newest` must be one of the hooks of the loop in the body. `sharding` is the sharding of batches.

  Raises:
    UserError: replaces the TooManySkippedError. Its message names the rows that the skipped steps
      have read.
  """
  try:
    yield
  except TooManySkippedError as error:
    rows = newest.rows_of(error.steps, config.global_batch_size)
    assert newest.state is not None  # The skipped steps have set it.
    params, batch_size = newest.state.params, config.micro_batch_size
    what = objective.explain(steps, params, rows, batch_size, sharding, folder)
    raise UserError(
      f"{error}: {what}; or lower optimizer.learning_rate in a new --workdir; with --debug_nans "
      "the same command continues from the last checkpoint and stops at the operation that makes "
      "the first NaN."
    ) from error
