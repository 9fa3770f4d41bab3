import types

import jax.numpy as jnp
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.training.small.saves import ShownSaves, SmallSaves
from cm3leon_jax.training.watch.metrics import DIGEST, MetricsLog
from tests.messages import refused
from tests.training.fakes import FakeCheckpoints, FakeStop

CONFIG = types.SimpleNamespace(steps=7, checkpoint_every=3, batch_size=10)
STATE = {"w": jnp.ones(2)}


def make(folder, code=None, saved=0):
  log = MetricsLog(folder)
  log.write(1, {"loss": 1.0})
  return SmallSaves(FakeCheckpoints(), log, FakeStop(code), "clip", CONFIG, "train again.", saved)


def test_some_states_and_the_last_one_are_saved_and_shown(tmp_path):
  saves, shown = make(tmp_path), []
  show = ShownSaves(saves, lambda step, state: shown.append(step))
  for step in range(1, 8):
    for hook in (saves, show):
      hook.after(step, STATE, {})
  assert saves.checkpoints.saves == [(3, 30, None), (6, 60, None), (7, 70, None)]
  assert shown == [3, 6, 7]
  assert saves.saved == 7
  assert (tmp_path / DIGEST).exists()
  saves.end(STATE)
  assert saves.checkpoints.closed


def test_a_signal_saves_the_step_that_it_ends_and_shows_nothing(tmp_path):
  saves, shown = make(tmp_path, code=75), []
  for hook in (saves, ShownSaves(saves, lambda *args: shown.append(args))):
    hook.after(2, STATE, {})
  assert saves.checkpoints.saves == [(2, 20, None)]
  assert shown == []


@pytest.mark.parametrize("step", [3, 7])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, step):
  saves = make(tmp_path, saved=2)
  with refused(UserError):
    saves.after(step, {"w": jnp.array([jnp.inf])}, {})
  assert (saves.checkpoints.saves, saves.saved) == ([], 2)
