import types

import jax.numpy as jnp
import pytest

from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.small.hooks import Lines, SmallSaves
from cm3leon_jax.training.watch.metrics import MetricsLog
from tests.refusals import refused
from tests.training.fakes import FakeCheckpoints, FakeStop

CONFIG = types.SimpleNamespace(steps=7, checkpoint_every=3, batch_size=10)
STATE = {"w": jnp.ones(2)}


def make_lines(folder, shown):
  def show(step, values):
    shown.append({"step": step, **values})

  return Lines(MetricsLog(folder), 3, 7, "clip", "train again.", show)


def make_saves(shown, code=None, saved=0, failure=None):
  return SmallSaves(
    FakeCheckpoints(failure), FakeStop(code), "clip", CONFIG, "train again.", saved,
    lambda step, state: shown.append(step),
  )  # fmt: skip


def test_some_steps_and_the_last_one_are_logged_and_shown(tmp_path):
  shown = []
  lines = make_lines(tmp_path, shown)
  for step in range(1, 8):
    lines.after(step, None, {"loss": jnp.float32(step / 2)})
  lines.end(None)
  assert shown == [{"step": step, "loss": step / 2} for step in (3, 6, 7)]
  assert read_json_lines(tmp_path / "metrics.jsonl") == shown


def test_a_number_that_is_not_finite_ends_the_training_and_is_not_logged(tmp_path):
  lines = make_lines(tmp_path, [])
  lines.after(2, None, {"loss": jnp.float32("nan")})  # Not logged, so not read.
  metrics = {"loss": jnp.float32("nan"), "scale": jnp.float32(2)}
  with refused(UserError):
    lines.after(3, None, metrics)
  assert read_json_lines(tmp_path / "metrics.jsonl") == []


def test_some_states_and_the_last_one_are_saved_and_shown(tmp_path):
  shown = []
  saves = make_saves(shown)
  for step in range(1, 8):
    saves.after(step, STATE, {})
  assert saves.checkpoints.saves == [(3, 30, None), (6, 60, None), (7, 70, None)]
  assert shown == [3, 6, 7]
  assert saves.saved == 7
  saves.end(STATE)
  assert saves.checkpoints.closed


def test_a_signal_saves_the_step_that_it_ends_and_shows_nothing(tmp_path):
  shown = []
  saves = make_saves(shown, code=75)
  saves.after(2, STATE, {})
  assert saves.checkpoints.saves == [(2, 20, None)]
  assert shown == []


@pytest.mark.parametrize("step", [3, 7])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, step):
  saves = make_saves([], saved=2)
  with refused(UserError):
    saves.after(step, {"w": jnp.array([jnp.inf])}, {})
  assert (saves.checkpoints.saves, saves.saved) == ([], 2)


def test_a_save_that_has_failed_ends_the_training(tmp_path):
  with pytest.raises(TryAgain, match="disk full"):
    make_saves([], failure=TryAgain("disk full")).after(1, STATE, {})
