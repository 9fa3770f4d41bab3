"""Tests in which steps a decoder training saves. `skipped_rows_test` covers real trainings."""

import jax.numpy as jnp
import pytest

from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.training.saves.saving import Saves
from cm3leon_jax.training.watch.heldout import HeldoutLosses
from tests.refusals import refused
from tests.training.fakes import FakeCheckpoints, FakeMonitor, FakeState, FakeStop

CONFIG = TrainConfig(steps=10, checkpoint_every=4, global_batch_size=8)


class FakeLosses(HeldoutLosses):
  """Fake held-out losses of the current step, or None if it was not evaluated."""

  def __init__(self, losses=None):
    self.losses = losses


def make(failure=None, **fakes):
  fakes = {"monitor": FakeMonitor(), "stop": FakeStop(), "heldout": FakeLosses(), **fakes}
  return Saves(FakeCheckpoints(failure), CONFIG, next_row=100, **fakes)


def saved(hook, steps):
  hook.begin(FakeState(steps[0] - 1))
  for step in steps:
    hook.after(step, {"w": jnp.ones(2)}, {})
  return hook.checkpoints.saves


def test_it_saves_every_few_steps_and_at_the_end():
  """Checkpoints contain the number of rows read in all starts, and the newest held-out loss."""
  hook = make(heldout=FakeLosses({"heldout_loss": 0.5}))
  assert saved(hook, range(3, 11)) == [(4, 116, 0.5), (8, 148, 0.5), (10, 164, 0.5)]
  assert (hook.saved, hook.next_row) == (10, 164)
  assert hook.monitor.events == ["save 4", "end", "save 8", "end", "save 10", "end"]
  assert saved(make(), [4]) == [(4, 108, None)]


def test_a_signal_saves_the_step_that_it_ends():
  assert saved(make(stop=FakeStop(75)), [7]) == [(7, 108, None)]


@pytest.mark.parametrize(
  ("step", "code", "skipped", "expected"),
  [
    (8, None, 0, True),
    (8, None, 1, False),
    (10, None, 6, True),  # Step 10 is the last step.
    (6, 75, 1, True),  # Step 5 changed the state since checkpoint 4.
    (6, 75, 2, False),
  ],
)
def test_while_steps_are_skipped_nothing_is_saved_but_what_a_run_ends_with(
  step, code, skipped, expected
):
  hook = make(monitor=FakeMonitor(skipped=skipped), stop=FakeStop(code))
  hook.begin(FakeState(4))
  hook.after(step, {"w": jnp.ones(2)}, {})
  assert bool(hook.checkpoints.saves) == expected


def test_a_state_that_is_not_finite_is_not_saved():
  hook = make()
  hook.begin(FakeState(3))
  with refused(UserError, "checkpoint 4", "w", "learning_rate"):
    hook.after(4, {"w": jnp.array([1.0, jnp.nan])}, {})
  assert hook.checkpoints.saves == []
  assert hook.saved == 3


def test_the_end_waits_for_the_last_save():
  hook = make()
  hook.end(FakeState(10))
  assert hook.checkpoints.closed
  assert hook.monitor.events == ["save 10", "end"]


def test_a_save_that_has_failed_ends_the_training():
  with pytest.raises(TryAgain, match="disk full"):
    saved(make(TryAgain("disk full")), [1])


def test_a_training_that_forgets_too_much_saves_its_last_step():
  forgets = FakeLosses()
  forgets.forgets = True
  assert saved(make(heldout=forgets), [7]) == [(7, 108, None)]
  assert saved(make(heldout=FakeLosses()), [7]) == []
