import itertools
from unittest import mock

from etils import epath
import jax
import pytest

from cm3leon_jax.config.training import OptimizerConfig, TrainConfig
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training import decoder
from cm3leon_jax.training.objective import RowObjective
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import Steps
from cm3leon_jax.training.watch import heldout
from cm3leon_jax.weights import reading
from tests.data.stores import VOCAB
from tests.models.tiny import mesh_of
from tests.training.runs import (
  MODEL,
  STEPS,
  Crash,
  arrays,
  assert_equal,
  crash_at,
  losses,
  run,
)


def test_the_loss_falls_and_every_step_is_logged(whole):
  folder, summary = whole
  found = losses(folder)
  assert sorted(found) == list(range(1, STEPS + 1))
  assert found[STEPS] < found[1] - 0.3
  assert summary["next_row"] == 8 * STEPS


def test_the_time_of_a_step_is_a_mean_without_the_first_which_compiles(tmp_path, monkeypatch):
  seconds, now = iter([60.0, 1.0, 2.0, 6.0]), [0.0]

  def take_step(state, batch, num_sources):
    now[0] += next(seconds)
    return state, {}

  steps = mock.Mock(spec=Steps, init=lambda: mock.Mock(spec=TrainState), train=take_step)
  monkeypatch.setattr(decoder, "compile_steps", lambda *_: steps)
  monkeypatch.setattr(decoder.time, "monotonic", lambda: now[0])
  objective = mock.Mock(spec=RowObjective, names=(), batches=lambda *_: itertools.repeat(None))
  training = decoder.DecoderTraining(
    folder=epath.Path(tmp_path), model=MODEL, optimizer=OptimizerConfig(), config=TrainConfig(),
    vocab=VOCAB, objective=objective, heldout=mock.Mock(spec=RowLoader), seed=0,
  )  # fmt: skip
  with jax.set_mesh(mesh_of(1, 1, 1)):
    assert decoder.step_seconds(training, 3) == 3.0


def test_a_killed_run_continues_bit_for_bit(whole, loader, tmp_path):
  """After a kill in step 11, the run repeats the steps since its checkpoint and continues."""
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(11, tmp_path), sample_every=1)
  assert max(losses(tmp_path)) == 11  # The loop logs a step before it reads the step's state.
  run(tmp_path, loader, fresh=True)
  assert losses(tmp_path) == losses(whole[0])
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  (event,) = [line for line in lines if line.get("event") == "resumed"]
  assert event["from_step"] in (4, 8)  # Checkpoint 8 is used if it was complete.
  assert event["replayed"] == event["identical"] == 11 - event["from_step"]


@pytest.mark.slow
def test_a_run_starts_from_given_parameters_and_its_checkpoint_wins_over_them(
  whole, loader, tmp_path
):
  """The average starts from the given parameters; optimizer and learning rate start from step 0."""
  given = mock.Mock(side_effect=lambda: reading.load_params(whole[0], MODEL)[0])
  first = {"learning_rate": 1e-30, "ema_decay": 0.9, "initial_params": given}
  run(tmp_path, loader, steps=1, **first)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    trained = reading.load_params(whole[0], MODEL)[0]
  assert_equal(*arrays(tmp_path))
  assert_equal(arrays(tmp_path)[0], trained)
  assert losses(tmp_path)[1] < losses(whole[0])[1] - 0.3
  assert given.call_count == 1
  assert run(tmp_path, loader, steps=1, **first)["steps"] == 1
  assert given.call_count == 1


def test_the_last_step_is_evaluated_once_and_its_losses_are_returned(loader, tmp_path):
  with mock.patch.object(heldout, "evaluate", wraps=heldout.evaluate) as evaluate:
    summary = run(tmp_path, loader, steps=4, eval_every=3)
    assert evaluate.call_count == 2  # Steps 3 and 4.
    lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
    last = [line for line in lines if "heldout_loss" in line][-1]
    assert {name: summary[name] for name in last if name != "step"} == {
      name: x for name, x in last.items() if name != "step"
    }
    again = run(tmp_path, loader, steps=4)  # The run has all its steps already.
    assert evaluate.call_count == 3
  assert again == summary


@pytest.mark.slow
def test_debug_nans_finds_the_operation_although_the_state_is_donated(loader, tmp_path):
  """After step 2, parameters are 1e37. Without the flag, the first wrong metrics are of step 3."""
  message = r"^step 3 is skipped: its loss is .* rows 16 to 23 were read; .*--debug_nans"
  with pytest.raises(UserError, match=message):
    run(tmp_path / "plain", loader, learning_rate=1e38, tensorboard=False, max_skipped=0)
  with jax.debug_nans(True), pytest.raises(FloatingPointError, match="invalid value"):
    run(tmp_path / "nans", loader, learning_rate=1e38, tensorboard=False, fresh=True)
