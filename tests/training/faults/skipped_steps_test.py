"""`skipped_rows_test` has runs that end because of skipped steps."""

from etils import epath
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.training.config import TrainConfig
from cm3leon_jax.training.faults.skipped_steps import NewestState, explaining
from cm3leon_jax.training.objective import Objective
from cm3leon_jax.training.step.numerics import TooManySkippedError
from cm3leon_jax.training.steps import Steps
from tests.messages import refused
from tests.training.fakes import FakeState


def test_rows_of_steps_are_counted_from_where_the_trainer_began():
  """100 steps of 16 rows, then steps of 8 rows."""
  newest = NewestState(100, 1_600)
  assert newest.rows_of(range(101, 103), 8) == range(1_600, 1_616)
  assert newest.rows_of(range(103, 104), 8) == range(1_616, 1_624)


class Explained(Objective):
  """An objective that notes what it is asked to explain."""

  names, length = (), 8

  def __init__(self):
    self.asked = []

  def explain(self, steps, params, rows, batch_size, sharding, folder):
    self.asked.append((params, rows, batch_size, folder))
    return "it was row 9"


CONFIG = TrainConfig(global_batch_size=4, gradient_accumulation_steps=2)
STEPS = Steps(*[lambda: None] * 5)
SHARDING = NamedSharding(Mesh(jax.devices()[:1], "data"), PartitionSpec())


def test_the_objective_explains_the_newest_state_and_the_rows_of_the_skipped_steps():
  objective, newest, folder = Explained(), NewestState(0, 0), epath.Path("run")
  for step in (1, 2, 3):
    newest.after(step, FakeState(params=f"of step {step}"), {})
  with (
    refused(UserError),
    explaining(objective, STEPS, newest, CONFIG, SHARDING, folder),
  ):
    raise TooManySkippedError("step 3 is skipped", range(2, 4))
  assert objective.asked == [("of step 3", range(4, 12), 2, folder)]


def test_other_errors_are_not_explained():
  objective = Explained()
  explained = explaining(objective, STEPS, NewestState(0, 0), CONFIG, SHARDING, epath.Path("run"))
  with pytest.raises(ZeroDivisionError), explained:
    raise ZeroDivisionError
  assert objective.asked == []
