import os
import signal
import threading
import time

from etils import epath
import jax
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.pipeline import RowLoader
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training import checkpoint
from cm3leon_jax.training.metrics import read_metrics
from cm3leon_jax.training.optimizer import OptimizerConfig
from cm3leon_jax.training.train import INTERRUPTED, TrainConfig, train
from tests.data.stores import VOCAB, make_plan, make_sources
from tests.models.tiny import mesh_of

MODEL = ModelConfig(
  vocab_size=VOCAB.size, num_layers=2, width=32, num_heads=4, mlp_width=64, max_positions=128, dtype="float32", loss_chunk=32
)
STEPS = 12


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
  return RowLoader(make_plan(make_sources(tmp_path_factory.mktemp("stores"))), VOCAB)


def run(folder, loader, shape=(1, 1, 1), draw_samples=None, **fields):
  config = TrainConfig(
    **{"steps": STEPS, "global_batch_size": 8, "eval_every": 5, "eval_batches": 1, "checkpoint_every": 4, **fields}
  )
  with jax.set_mesh(mesh_of(*shape)):
    return train(epath.Path(folder), MODEL, OptimizerConfig(learning_rate=1e-2), config, VOCAB, loader, loader, 0, draw_samples)


def losses(folder):
  return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics" / "metrics.jsonl") if "loss" in line}


@pytest.fixture(scope="module")
def whole(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  summary = run(folder, loader)
  return folder, summary


class Crash(Exception):
  """Stands for a machine that goes away in the middle of a step."""


def crash_at(step, folder):
  """Crashes in `step`, but lets a save that has begun end: its thread would outlive the crash, as no killed process's does."""

  def draw(_, at):
    if at == step:
      while any("tmp" in path.name for path in (folder / checkpoint.FOLDER).iterdir()):
        time.sleep(0.05)
      raise Crash

  return draw


def test_the_loss_falls_and_every_step_is_logged(whole):
  folder, summary = whole
  found = losses(folder)
  assert sorted(found) == list(range(1, STEPS + 1))
  assert found[STEPS] < found[1] - 0.3
  assert summary["next_row"] == 8 * STEPS


def test_a_killed_run_continues_bit_for_bit(whole, loader, tmp_path):
  """Killed in step 11, continued from the newest checkpoint: the steps after it come again, the rest as if never stopped."""
  with pytest.raises(Crash):
    run(tmp_path, loader, draw_samples=crash_at(11, tmp_path), sample_every=1)
  assert max(losses(tmp_path)) == 10  # A step is logged when the next one has started.
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])
  (event,) = [line for line in read_metrics(tmp_path / "metrics" / "metrics.jsonl") if line.get("event") == "resumed"]
  assert event["from_step"] in (4, 8)  # Step 8 counts if its asynchronous save was whole by then.
  assert event["replayed"] == event["identical"] == 10 - event["from_step"]


def test_another_seed_gives_other_losses(whole, tmp_path_factory):
  other = RowLoader(make_plan(make_sources(tmp_path_factory.mktemp("stores")), seed=1), VOCAB)
  folder = tmp_path_factory.mktemp("other")
  run(folder, other)
  assert losses(folder) != losses(whole[0])


def test_sigterm_saves_and_the_same_call_continues(whole, loader, tmp_path):
  def terminate(_, step):
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  assert threading.current_thread() is threading.main_thread()
  with pytest.raises(SystemExit) as stop:
    run(tmp_path, loader, draw_samples=terminate, sample_every=1)
  assert stop.value.code == INTERRUPTED
  assert checkpoint.Checkpoints(tmp_path, 2).newest() == 4
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])


def test_restore_onto_another_mesh(whole, loader, tmp_path):
  with pytest.raises(Crash):
    run(tmp_path, loader, draw_samples=crash_at(9, tmp_path), sample_every=1)
  run(tmp_path, loader, shape=(2, 2, 2))
  expected = losses(whole[0])
  for step, loss in losses(tmp_path).items():
    assert loss == pytest.approx(expected[step], rel=2e-4)


def test_a_flipped_bit_is_found(whole, loader, tmp_path):
  run(tmp_path, loader, steps=4)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    assert checkpoint.load_params(tmp_path, MODEL)[1] == 4
    files = [p for p in (tmp_path / checkpoint.FOLDER / "4").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
      checkpoint.load_params(tmp_path, MODEL)


def test_no_checkpoint_is_told(tmp_path):
  with pytest.raises(UserError, match=r"run `python -m launch\.train` first"):
    checkpoint.load_params(tmp_path, MODEL)


def test_a_batch_that_does_not_split_is_told(loader, tmp_path):
  with pytest.raises(UserError, match="global_batch_size is 6"):
    run(tmp_path, loader, shape=(2, 2, 2), global_batch_size=6)


def test_a_save_that_was_killed_before_its_digests_pushes_no_other_out(loader, tmp_path):
  run(tmp_path, loader, steps=8)
  (tmp_path / "checkpoints.digests" / "8.json").unlink()
  run(tmp_path, loader, steps=9, checkpoint_every=9)
  events = [line for line in read_metrics(tmp_path / "metrics" / "metrics.jsonl") if line.get("event") == "resumed"]
  assert [e["from_step"] for e in events] == [4]
  assert sorted(losses(tmp_path)) == list(range(1, 10))


def test_checkpoints_whose_digests_are_all_gone_are_not_trained_over(loader, tmp_path):
  run(tmp_path, loader, steps=8)
  for digests in (tmp_path / "checkpoints.digests").iterdir():
    digests.unlink()
  with pytest.raises(UserError, match="no digests of them"):
    run(tmp_path, loader)
  assert sorted(losses(tmp_path)) == list(range(1, 9))


def test_a_shorter_run_leaves_a_longer_one_as_it_is(loader, tmp_path, capsys):
  run(tmp_path, loader, steps=4)
  assert run(tmp_path, loader, steps=2)["steps"] == 4
  assert "is at step 4 already" in capsys.readouterr().out


@pytest.mark.parametrize(
  "fields", [{"keep_checkpoints": 1}, {"steps": 0}, {"global_batch_size": 8, "gradient_accumulation_steps": 3}]
)
def test_config_errors_name_the_field(fields):
  with pytest.raises(ValueError, match=next(reversed(fields))):
    TrainConfig(**fields)
