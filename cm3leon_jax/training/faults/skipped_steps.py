"""Steps that were skipped, too many in a row: a run that they end says what they had read."""

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
  """Remembers the state of the newest step, and where the run began.

  Attributes:
    state: None before the first step.
  """

  def __init__(self, step: int, next_row: int):
    """Remembers the begin of this start: the step before its first one, and its first row."""
    self._step, self._next_row = step, next_row
    self.state: TrainState | None = None

  def after(self, step: int, state: TrainState, metrics: dict) -> None:
    """See `Hook`."""
    self.state = state

  def rows_of(self, steps: range, batch_size: int) -> range:
    """Returns the rows that steps since the start have read; before, batches had another size."""
    first = self._next_row + (steps[0] - 1 - self._step) * batch_size
    return range(first, first + len(steps) * batch_size)


@contextlib.contextmanager
def explaining(
  objective: Objective, steps: Steps, newest: NewestState, config: TrainConfig,
  sharding: NamedSharding, folder: epath.Path,
) -> Iterator[None]:  # fmt: skip
  """Explains to the user why a body that trains has stopped because of skipped steps.

  Args:
    objective: of the run.
    steps: of the run.
    newest: a hook of the body.
    config: of the run.
    sharding: of the rows of a batch.
    folder: of the run.

  Raises:
    UserError: in place of a TooManySkippedError, with the rows that these steps read.
  """
  try:
    yield
  except TooManySkippedError as error:
    rows = newest.rows_of(error.steps, config.global_batch_size)
    assert newest.state is not None  # Steps were taken.
    params, batch_size = newest.state.params, config.micro_batch_size
    what = objective.explain(steps, params, rows, batch_size, sharding, folder)
    raise UserError(
      f"{error}: {what}; or lower optimizer.learning_rate in a new --workdir; with --debug_nans "
      "the same command continues from the last checkpoint and stops at the operation that makes "
      "the first NaN."
    ) from error
