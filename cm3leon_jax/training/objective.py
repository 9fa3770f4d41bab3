"""Defines training objectives: the batches that the steps of a run read."""

# B rows of a step.

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
from typing import Protocol, runtime_checkable

import jax
from jax.sharding import NamedSharding

from cm3leon_jax.data.rows.loader import RowLoader, batches
from cm3leon_jax.data.rows.skipped_rows import Remaining
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import spec
from cm3leon_jax.training.step.numerics import TooManySkippedError


@runtime_checkable
class Objective(Protocol):
  """Training objective: provides the batches of a run."""

  @property
  def names(self) -> Sequence[str]:
    """Names of the sources of rows. Losses are logged per source."""

  @property
  def length(self) -> int:
    """Number of tokens in a row of the batch."""

  def batches(self, next_row: int, rows: int) -> Iterator:
    """Yields the batches of the steps from `next_row` on, with `rows` rows per step."""

  def explain(self, rows: range) -> str:
    """Returns a clause for a message: what the skipped steps read, and what the user can do.

    `rows` are the rows of these steps, as `batches` counts them.
    """


@dataclasses.dataclass(frozen=True)
class RowObjective:
  """Objective of pretraining and tuning: the cross-entropy of a loader's rows.

  Attributes:
    loader: reads all rows, including the skipped ones.
    skipped: ranges of rows to skip, from `skipped_rows.read`.
  """

  loader: RowLoader
  skipped: tuple[range, ...] = ()

  @property
  def names(self) -> Sequence[str]:
    """Names of the loader's sources."""
    return self.loader.source_names

  @property
  def length(self) -> int:
    """Number of tokens in a row."""
    return self.loader.plan.config.sequence_length

  def batches(self, next_row: int, rows: int) -> Iterator:
    """See `Objective`."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch", "length"))
    return batches(Remaining(self.loader, self.skipped), next_row, rows, sharding)

  def explain(self, rows: range) -> str:
    """See `Objective`."""
    remaining = Remaining(self.loader, self.skipped)
    first, last = remaining.number(rows[0]), remaining.number(rows[-1])
    return (
      f"rows {first} to {last} were read; `cm3leon inspect_data --first_row={first}` shows them, "
      f"and `cm3leon checkpoints rollback --step=STEP --skip_rows={first}:{last}` goes back to an "
      "earlier checkpoint, from which `cm3leon train` continues without them"
    )


@contextlib.contextmanager
def explaining(objective: Objective, done: int, next_row: int, batch_size: int) -> Iterator[None]:
  """Adds to a TooManySkippedError of the `with` block which rows the skipped steps read.

  `done` is the number of steps before this start, and `next_row` is the first row after them.

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
