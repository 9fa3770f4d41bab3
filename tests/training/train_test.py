import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock
import urllib.request

from etils import epath
import jax
from jax.sharding import NamedSharding
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import CTRL_C, INTERRUPTED, UserError
from cm3leon_jax.data.pipeline import RowLoader
from cm3leon_jax.io import read_json_lines
from cm3leon_jax.mesh import spec
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training import checkpoint, upkeep
from cm3leon_jax.training import train as train_module
from cm3leon_jax.training.flops import model_flops
from cm3leon_jax.training.objective import Rows
from cm3leon_jax.training.optimizer import OptimizerConfig, create_optimizer
from cm3leon_jax.training.state import init_state
from cm3leon_jax.training.train import TrainConfig, compile_steps, train
from tests.data.stores import VOCAB, make_plan, make_sources
from tests.distributed_test import free_port
from tests.models.tiny import mesh_of
from tests.training import events
from tests.training.profile_test import traced_steps

MODEL = ModelConfig(
  vocab_size=VOCAB.size,
  num_layers=2,
  width=32,
  num_heads=4,
  mlp_width=64,
  max_positions=128,
  dtype="float32",
  loss_chunk=32,
)
STEPS = 12


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
  return RowLoader(make_plan(make_sources(tmp_path_factory.mktemp("stores"))), VOCAB)


@functools.cache
def shared_steps(model, optimizer, steps, accumulation, vocab, seed, mesh):
  """Compiled once for all runs of the same steps: compilation takes most of the time."""
  config = TrainConfig(
    steps=steps, gradient_accumulation_steps=accumulation, global_batch_size=accumulation
  )
  return compile_steps(model, optimizer, config, vocab, seed)


def run(
  folder,
  loader,
  shape=(1, 1, 1),
  sample_grid=None,
  learning_rate=1e-2,
  profile_steps=range(0),
  fresh=False,
  ema_decay=0.0,
  initial_params=None,
  skip_above=0.0,
  skipped=(),
  go_back=None,
  **fields,
):
  """Trains; with `fresh` the steps are compiled again, as in a new process."""
  config = TrainConfig(
    **{
      "steps": STEPS,
      "global_batch_size": 8,
      "eval_every": 5,
      "eval_batches": 1,
      "checkpoint_every": 4,
      **fields,
    }
  )
  optimizer = OptimizerConfig(
    learning_rate=learning_rate, ema_decay=ema_decay, skip_above=skip_above
  )

  def steps(model, optimizer, config, vocab, seed):
    mesh = jax.sharding.get_mesh()
    return shared_steps(
      model, optimizer, config.steps, config.gradient_accumulation_steps, vocab, seed, mesh
    )

  with (
    jax.set_mesh(mesh_of(*shape)),
    mock.patch.object(train_module, "compile_steps", compile_steps if fresh else steps),
  ):
    return train(
      epath.Path(folder),
      MODEL,
      optimizer,
      config,
      VOCAB,
      Rows(loader, skipped),
      loader,
      0,
      sample_grid,
      profile_steps,
      initial_params,
      go_back=go_back,
    )


def losses(folder):
  return {
    line["step"]: line["loss"]
    for line in read_json_lines(folder / "metrics" / "metrics.jsonl")
    if "loss" in line
  }


@pytest.fixture(scope="module")
def whole(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  summary = run(folder, loader)
  return folder, summary


class Crash(Exception):
  """Stands for a machine that goes away in the middle of a step."""


def crash_at(step, folder):
  """Crashes in `step` after the last save: its thread would outlive the crash, unlike a process."""

  def crash(_, at):
    if at == step:
      while any("tmp" in path.name for path in (folder / checkpoint.FOLDER).iterdir()):
        time.sleep(0.05)
      raise Crash

  return crash


def test_the_loss_falls_and_every_step_is_logged(whole):
  folder, summary = whole
  found = losses(folder)
  assert sorted(found) == list(range(1, STEPS + 1))
  assert found[STEPS] < found[1] - 0.3
  assert summary["next_row"] == 8 * STEPS


def test_a_killed_run_continues_bit_for_bit(whole, loader, tmp_path):
  """A run that is killed in step 11 repeats the steps after its checkpoint, then continues."""
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(11, tmp_path), sample_every=1)
  assert max(losses(tmp_path)) == 11  # A step is logged before anything that needs its state.
  run(tmp_path, loader, fresh=True)
  assert losses(tmp_path) == losses(whole[0])
  (event,) = [
    line
    for line in read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
    if line.get("event") == "resumed"
  ]
  assert event["from_step"] in (4, 8)  # Step 8 counts if its asynchronous save was whole by then.
  assert event["replayed"] == event["identical"] == 11 - event["from_step"]


def test_a_run_that_is_killed_while_it_samples_makes_that_grid_again(loader, tmp_path):
  """No checkpoint of the step may count before its grid is written."""
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(4, tmp_path), sample_every=4)
  seen = []
  run(tmp_path, loader, sample_grid=lambda _, step: seen.append(step), sample_every=4)
  assert seen == [4, 8, 12]


def arrays(folder):
  """The parameters of the last checkpoint, and the average that is loaded from it."""
  with jax.set_mesh(mesh_of(1, 1, 1)):
    optimizer = create_optimizer(OptimizerConfig(), STEPS)
    init = functools.partial(init_state, MODEL, optimizer, jax.random.key(0), averaged=True)
    checkpoints = checkpoint.Checkpoints(folder, 2)
    state, _ = checkpoints.restore(jax.eval_shape(init), checkpoints.newest())
    checkpoints.close()
    return state.params, checkpoint.load_params(folder, MODEL)[0]


def assert_equal(*trees):
  jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_killed_run_with_an_average_continues_bit_for_bit(loader, tmp_path):
  """The held-out losses and the samples are those of the average."""
  seen = {}

  def sample_grid(params, step):
    seen[step] = jax.device_get(params)

  summary = run(tmp_path / "whole", loader, sample_grid=sample_grid, ema_decay=0.9)
  killed = tmp_path / "killed"
  with pytest.raises(Crash):
    run(killed, loader, sample_grid=crash_at(7, killed), sample_every=1, ema_decay=0.9)
  assert run(killed, loader, ema_decay=0.9) == summary
  (params, average), expected = arrays(killed), arrays(tmp_path / "whole")
  assert_equal((params, average), expected)
  assert_equal(seen[STEPS], jax.device_get(average))
  with jax.set_mesh(mesh_of(1, 1, 1)):
    mesh = jax.sharding.get_mesh()
    steps = shared_steps(
      MODEL, OptimizerConfig(learning_rate=1e-2, ema_decay=0.9), STEPS, 1, VOCAB, 0, mesh
    )
    sharding = NamedSharding(mesh, spec("batch", "length"))
    config = TrainConfig(global_batch_size=8, eval_batches=1)
    rows = train_module.heldout_batches(loader, config, sharding)
    found = train_module.evaluate(steps, average, rows)
    assert found.items() <= summary.items()
    assert train_module.evaluate(steps, params, rows)["heldout_loss"] != found["heldout_loss"]


def test_a_run_starts_from_given_parameters_and_its_checkpoint_wins_over_them(
  whole, loader, tmp_path
):
  """They replace the parameters and start the average; optimizer and learning rate are new."""
  given = mock.Mock(side_effect=lambda: checkpoint.load_params(whole[0], MODEL)[0])
  first = {"learning_rate": 1e-30, "ema_decay": 0.9, "initial_params": given}
  run(tmp_path, loader, steps=1, **first)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    trained = checkpoint.load_params(whole[0], MODEL)[0]
  assert_equal(*arrays(tmp_path))
  assert_equal(arrays(tmp_path)[0], trained)
  assert losses(tmp_path)[1] < losses(whole[0])[1] - 0.3
  assert given.call_count == 1
  assert run(tmp_path, loader, steps=1, **first)["steps"] == 1
  assert given.call_count == 1


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
    run(tmp_path, loader, sample_grid=terminate, sample_every=1)
  assert stop.value.code == INTERRUPTED
  assert checkpoint.Checkpoints(tmp_path, 2).newest() == 4
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])


@pytest.fixture
def foreground():
  """SIGINT as a program in the foreground has it, wherever the tests run."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_a_run_in_the_background_of_a_script_ignores_ctrl_c(whole, loader, tmp_path):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  run(tmp_path, loader, sample_grid=lambda *_: os.kill(os.getpid(), signal.SIGINT), sample_every=6)
  assert losses(tmp_path) == losses(whole[0])


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_saves_and_the_same_call_continues(whole, loader, tmp_path, capfd):
  def interrupt(_, step):
    if step == 3:
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(SystemExit) as stop:
    run(tmp_path, loader, sample_grid=interrupt, sample_every=1)
  assert stop.value.code == CTRL_C
  out, err = capfd.readouterr()
  assert "stopped at step 4 of 12; saved in " in out
  assert "Ctrl-C: the run saves after this step; once more stops it at once." in err
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])


@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_stops_at_once_and_loses_no_save(whole, loader, tmp_path):
  def interrupt(_, step):
    if step == 5:  # The save of step 4 may be in flight.
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, loader, sample_grid=interrupt, sample_every=1)
  assert checkpoint.Checkpoints(tmp_path, 2).newest() == 4
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])


def test_a_run_that_is_rolled_back_continues_bit_for_bit(whole, loader, tmp_path):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  (tmp_path / "done.json").write_text("{}")
  folder = epath.Path(tmp_path)
  assert upkeep.rollback(folder, 8) == [
    f"removed {folder / 'done.json'}: without it the run is not finished, and generate, evaluate "
    "and export refuse it until launch.train has reached its last step.",
    "removed checkpoint 12.",
    "removed steps 9 to 12 from metrics/metrics.jsonl.",
    "launch.train continues from step 8.",
  ]
  assert sorted(losses(tmp_path)) == list(range(1, 9))
  run(tmp_path, loader)
  assert losses(tmp_path) == losses(whole[0])
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  assert [line["event"] for line in lines if "event" in line] == ["rolled_back", "resumed"]


def test_the_checkpoint_of_the_lowest_heldout_loss_is_kept(loader, tmp_path):
  """A learning rate that is too high makes later steps worse."""
  run(
    tmp_path, loader, learning_rate=3.0, steps=5, eval_every=1, checkpoint_every=1, keep_best=1,
    tensorboard=False,
  )  # fmt: skip
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  heldout = {line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}
  best = min(heldout, key=heldout.get)
  assert best < 4
  assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {best, 4, 5}


def test_restore_onto_another_mesh(whole, loader, tmp_path):
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(9, tmp_path), sample_every=1)
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


def test_a_run_with_a_damaged_checkpoint_continues_from_the_one_before(
  whole, loader, tmp_path, capsys
):
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(11, tmp_path), sample_every=1)
  files = [p for p in (tmp_path / checkpoint.FOLDER / "8").rglob("*") if p.is_file()]
  max(files, key=lambda p: p.stat().st_size).write_bytes(b"")
  run(tmp_path, loader)
  assert "; the run goes back to checkpoint 4." in capsys.readouterr().out
  assert losses(tmp_path) == losses(whole[0])


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(loader, tmp_path):
  run(tmp_path, loader, steps=9)
  for folder in (checkpoint.FOLDER, f"{checkpoint.FOLDER}.digests"):
    shutil.rmtree(tmp_path / folder)
  with pytest.raises(UserError, match=r"has logged 9 steps and has no checkpoint: restore"):
    run(tmp_path, loader)
  assert sorted(losses(tmp_path)) == list(range(1, 10))


def test_prometheus_reads_a_run_while_it_trains(loader, tmp_path):
  """In the grid of step 8: the endpoint is open as long as the run trains."""
  port, found = free_port(), []

  def scrape(*_):
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as answer:
      found.append(dict(re.findall(r"^cm3leon_(\w+) (\S+)$", answer.read().decode(), flags=re.M)))

  run(tmp_path, loader, sample_grid=scrape, sample_every=8, steps=8, metrics_port=port)
  [values] = [{name: float(x) for name, x in values.items()} for values in found]
  assert (values["step"], values["steps"]) == (8, 8)
  assert values["loss"] == losses(tmp_path)[8]
  assert 0 < values["goodput_ratio"] < 1
  assert values["tokens_per_second"] > 0
  assert 0 < values["seconds_since_last_step"] < 60
  with pytest.raises(OSError, match="refused"):
    scrape()


HOLD = """
import sys, time
from cm3leon_jax.training import lease
lease.BEAT_SECONDS = 0.1
with lease.Lease(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_folder_in_which_another_process_trains_is_refused(whole, loader, tmp_path):
  with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as other:
    try:
      assert other.stdout.readline() == b"held\n"
      with pytest.raises(UserError, match=r"works in .*: use another --workdir"):
        run(tmp_path, loader)
      assert not (tmp_path / "metrics").exists()
    finally:
      other.kill()
  run(tmp_path, loader)  # The other one is gone, and is not waited for.
  assert losses(tmp_path) == losses(whole[0])


def test_a_missing_checkpoint_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"run `python -m launch\.train` first"):
    checkpoint.load_params(tmp_path, MODEL)


def test_a_batch_that_does_not_split_is_refused(loader, tmp_path):
  with pytest.raises(UserError, match="global_batch_size is 6"):
    run(tmp_path, loader, shape=(2, 2, 2), global_batch_size=6)


def test_rows_of_a_device_set_the_passes(loader, tmp_path):
  """On one device 8 rows are 4 passes of 2; bit for bit as if the config said so."""
  run(tmp_path / "rows", loader, steps=4, rows_per_device=2)
  run(tmp_path / "passes", loader, steps=4, gradient_accumulation_steps=4)
  assert losses(tmp_path / "rows") == losses(tmp_path / "passes")
  with pytest.raises(UserError, match=r"train\.rows_per_device = 4 x 3 = 12 must divide it"):
    run(tmp_path, loader, shape=(2, 2, 2), rows_per_device=3)


def test_a_save_that_was_killed_before_its_digests_pushes_no_other_out(loader, tmp_path):
  run(tmp_path, loader, steps=8)
  (tmp_path / "checkpoints.digests" / "8.json").unlink()
  run(tmp_path, loader, steps=9, checkpoint_every=9)
  events = [
    line
    for line in read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
    if line.get("event") == "resumed"
  ]
  assert [e["from_step"] for e in events] == [4]
  assert sorted(losses(tmp_path)) == list(range(1, 10))


def test_checkpoints_whose_digests_are_all_gone_are_not_trained_over(loader, tmp_path):
  run(tmp_path, loader, steps=8)
  for digests in (tmp_path / "checkpoints.digests").iterdir():
    digests.unlink()
  with pytest.raises(UserError, match="no digests of them"):
    run(tmp_path, loader)
  assert sorted(losses(tmp_path)) == list(range(1, 9))


def test_the_last_step_is_evaluated_once_and_its_losses_are_returned(loader, tmp_path):
  with mock.patch.object(train_module, "evaluate", wraps=train_module.evaluate) as evaluate:
    summary = run(tmp_path, loader, steps=4, eval_every=3)
    assert evaluate.call_count == 2  # At steps 3 and 4.
    lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
    last = [line for line in lines if "heldout_loss" in line][-1]
    assert {name: summary[name] for name in last if name != "step"} == {
      name: x for name, x in last.items() if name != "step"
    }
    again = run(tmp_path, loader, steps=4)  # Nothing is left to train.
    assert evaluate.call_count == 3
  assert again == summary


def test_a_shorter_run_leaves_a_longer_one_as_it_is(loader, tmp_path, capsys):
  run(tmp_path, loader, steps=4)
  assert run(tmp_path, loader, steps=2)["steps"] == 4
  assert "is at step 4 already" in capsys.readouterr().out


def test_tensorboard_shows_every_step_of_a_killed_run_once(loader, tmp_path):
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(7, tmp_path), sample_every=1)
  grid = Image.new("RGB", (8, 4), "red")
  run(tmp_path, loader, steps=8, sample_grid=lambda *_: grid, sample_every=8, histogram_every=8)
  found = events.read(tmp_path / "tensorboard")
  assert {step: len(values) for step, values in found["train/loss"].items()} == dict.fromkeys(
    range(1, 9), 1
  )
  assert found["train/loss"] == {
    step: [np.float32(loss)] for step, loss in losses(tmp_path).items()
  }
  assert sorted(found["heldout/image_loss"]) == [5, 8]
  assert [(image.width, image.height) for image in found["samples"][8]] == [(8, 4)]
  assert found["params/embed"][8][0].num == MODEL.vocab_size * MODEL.width


def test_goodput_is_printed_and_summed_over_starts(loader, tmp_path, capsys):
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(7, tmp_path), sample_every=1, fresh=True)
  run(tmp_path, loader, steps=8, tensorboard=False, fresh=True)
  lines = [
    line for line in read_json_lines(tmp_path / "metrics" / "metrics.jsonl") if "goodput" in line
  ]
  assert [line["step"] for line in lines] == [
    4,
    5,
    8,
    8,
    8,
  ]  # At 4 and 8 the saves, at 5 and 8 evaluations, and the end.
  for before, line in itertools.pairwise(lines):
    assert all(line[name] >= before[name] for name in line if name.endswith("_seconds"))
  assert lines[0]["lost_seconds"] == 0 < lines[-1]["lost_seconds"]
  total = sum(x for name, x in lines[-1].items() if name.endswith("_seconds"))
  assert lines[-1]["goodput"] == pytest.approx(lines[-1]["step_seconds"] / total, abs=1e-3)
  printed = re.search(r"train: goodput (.*)% of (\d+) s: steps", capsys.readouterr().out)
  assert float(printed[1]) == pytest.approx(100 * lines[-1]["goodput"], abs=0.06)  # Both rounded.
  assert int(printed[2]) == pytest.approx(total, abs=0.51)


def test_a_trace_holds_the_chosen_steps_and_no_others(loader, tmp_path):
  run(tmp_path, loader, steps=6, profile_steps=range(3, 5))
  assert traced_steps(tmp_path / "profile") == [3, 4]


def test_mfu_is_that_of_the_whole_batch(loader, tmp_path):
  run(tmp_path, loader, steps=2, peak_flops=1e9, tensorboard=False)
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  (line,) = [line for line in lines if "mfu" in line]
  seconds = line["weight"] / line["tokens_per_second"]
  tokens = 8 * loader.plan.config.sequence_length
  assert line["mfu"] == pytest.approx(
    model_flops(MODEL, tokens, tokens // 8) / seconds / 1e9, rel=1e-2
  )


def test_debug_nans_finds_the_operation_although_the_state_is_donated(loader, tmp_path):
  """Parameters are 1e37 after step 2; without the flag step 3 has the first wrong metrics."""
  shape = (1, 2, 1)
  message = r"^step 3 is skipped: its loss is .* rows 16 to 23 were read, .*--debug_nans"
  with pytest.raises(UserError, match=message):
    run(tmp_path / "plain", loader, shape, learning_rate=1e38, tensorboard=False, max_skipped=0)
  with jax.debug_nans(True), pytest.raises(FloatingPointError, match="invalid value"):
    run(tmp_path / "nans", loader, shape, learning_rate=1e38, tensorboard=False, fresh=True)


def test_debug_nans_changes_nothing_where_all_is_finite(whole, loader, tmp_path):
  with jax.debug_nans(True):
    run(tmp_path, loader, steps=4, fresh=True)
  assert losses(tmp_path)[1] == losses(whole[0])[1]


@pytest.mark.parametrize(
  "fields",
  [
    {"keep_checkpoints": 1},
    {"steps": 0},
    {"global_batch_size": 8, "gradient_accumulation_steps": 3},
    {"checkpoint_every": 4, "keep_every": 6},
    {"eval_every": 3, "checkpoint_every": 4, "keep_best": 1},
    {"log_every": 0},
    {"histogram_every": -1},
    {"peak_flops": -1.0},
    {"max_skipped": -1},
  ],
)
def test_config_errors_name_the_field(fields):
  with pytest.raises(ValueError, match=next(reversed(fields))):
    TrainConfig(**fields)
