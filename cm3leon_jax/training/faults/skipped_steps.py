"""Explains to the user why a run has stopped after too many skipped steps."""

from collections.abc import Iterator
import contextlib

from cm3leon_jax.config import UserError
from cm3leon_jax.training.objective import Objective
from cm3leon_jax.training.step.numerics import TooManySkippedError


@contextlib.contextmanager
def explaining(objective: Objective, done: int, next_row: int, batch_size: int) -> Iterator[None]:
  """Extends a TooManySkippedError of the body by the rows that the skipped steps had read.

  `done` is the number of steps before this start, and `next_row` is the first row of this start.

  Raises:
    UserError: in place of a TooManySkippedError.
  """
  try:
    yield
  except TooManySkippedError as error:
    first = next_row + (error.steps[0] - 1 - done) * batch_size
    what = objective.explain(range(first, first + len(error.steps) * batch_size))
    raise UserError(
      f"{error}: {what}; or lower optimizer.learning_rate in a new --workdir; with --debug_nans "
      "the same command continues from the last checkpoint and stops at the operation that makes "
      "the first NaN."
    ) from error
