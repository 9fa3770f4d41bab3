"""Defines training objectives: the step function of a run, and the batches that its steps read."""

# B rows of a step.

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Protocol, runtime_checkable

from etils import epath
import jax
from jax.sharding import NamedSharding
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.data.rows.loader import RowLoader, batches
from cm3leon_jax.training.faults import skipped_rows
from cm3leon_jax.training.faults.skipped_rows import Remaining
from cm3leon_jax.training.steps import Steps


@runtime_checkable
class Objective(Protocol):
  """What the decoder learns: the step function and the batches of a run."""

  @property
  def names(self) -> Sequence[str]:
    """Names of the sources that rows of a batch are marked with. Their losses are logged."""

  @property
  def length(self) -> int:
    """Number of tokens in a row of the batch."""

  def begin(
    self, steps: Steps, next_row: int, rows: int, sharding: NamedSharding
  ) -> tuple[Callable, Iterator]:
    """Begins to read rows.

    Args:
      steps: the compiled functions of the run.
      next_row: first row to read.
      rows: number of rows per step.
      sharding: sharding of the batches.

    Returns:
      `take_step(state, batch)`, which returns the new state and metrics, and an iterator over the
      batches.
    """

  def explain(
    self, steps: Steps, params: dict, rows: range, batch_size: int, sharding: NamedSharding,
    folder: epath.Path,
  ) -> str:  # fmt: skip
    """Describes the rows that skipped steps had read. All processes must call it.

    Args:
      steps: the compiled functions of the run.
      params: parameters after the skipped steps.
      rows: rows that these steps read, counted as in `begin`.
      batch_size: number of rows whose loss is computed in one call.
      sharding: sharding of the batches.
      folder: the folder of the run, which may receive a file.

    Returns:
      A sentence for the user.
    """


@dataclasses.dataclass(frozen=True)
class RowObjective:
  """Objective of pretraining and tuning: the cross-entropy of a loader's rows.

  Attributes:
    loader: reads all rows, including the skipped ones.
    skipped: ranges of rows to leave out, from `skipped_rows.read`.
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

  def begin(
    self, steps: Steps, next_row: int, rows: int, sharding: NamedSharding
  ) -> tuple[Callable, Iterator]:
    """See `Objective`."""
    take_step = functools.partial(steps.train, num_sources=len(self.names))
    return take_step, batches(Remaining(self.loader, self.skipped), next_row, rows, sharding)

  def explain(
    self, steps: Steps, params: dict, rows: range, batch_size: int, sharding: NamedSharding,
    folder: epath.Path,
  ) -> str:  # fmt: skip
    """Saves the rows with the largest losses; see `Objective` and `skipped_rows.save`."""
    remaining = Remaining(self.loader, self.skipped)
    read = batches(remaining, rows.start, batch_size, sharding)
    count = len(rows) // batch_size
    with jax.debug_nans(False):  # Losses may be NaN here; such rows are counted below.
      found = [steps.row_losses(params, batch) for batch in itertools.islice(read, count)]
    losses = np.concatenate([np.asarray(x.addressable_data(0)) for x in found])
    numbers = [remaining.number(row) for row in rows]
    with distributed.together():
      if distributed.is_first():
        skipped_rows.save(folder, self.loader, np.array(numbers), losses)
    not_finite = int((~np.isfinite(losses)).sum())
    what = f"{not_finite} of them have a loss that is not finite"
    if not_finite == len(losses):
      what = "the loss of each is not finite, so the parameters are to blame"
    elif not not_finite:
      what = "each of them has a finite loss"
    return (
      f"rows {numbers[0]} to {numbers[-1]} were read, and {what}; "
      f"`cm3leon inspect_data --skipped` shows the worst of them, and "
      f"`cm3leon train --resume_from=STEP --skip_rows={numbers[0]}:{numbers[-1]}` continues "
      "without them from an earlier checkpoint"
    )
