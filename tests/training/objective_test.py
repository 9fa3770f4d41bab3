"""Tests the count of skipped steps. `skipped_rows_test` covers runs that skipped steps stop."""

import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.training.objective import Objective, explaining
from cm3leon_jax.training.step.numerics import TooManySkippedError
from tests.refusals import refused


class Explained(Objective):
  """Objective that records the rows that it must explain."""

  names, length = (), 8

  def __init__(self):
    self.asked = []

  def explain(self, rows):
    self.asked.append(rows)
    return "it was row 9"


@pytest.mark.parametrize(
  ("steps", "rows"),
  [(range(101, 103), range(1_600, 1_616)), (range(103, 104), range(1_616, 1_624))],
)
def test_rows_of_steps_are_counted_from_where_the_trainer_began(steps, rows):
  """The run had 100 steps of 16 rows, and has had steps of 8 rows since then."""
  objective = Explained()
  with refused(UserError, "step 104", "it was row 9"), explaining(objective, 100, 1_600, 8):
    raise TooManySkippedError("step 104 is skipped", steps)
  assert objective.asked == [rows]


def test_other_errors_are_not_explained():
  objective = Explained()
  with pytest.raises(ZeroDivisionError), explaining(objective, 0, 0, 8):
    raise ZeroDivisionError
  assert objective.asked == []
