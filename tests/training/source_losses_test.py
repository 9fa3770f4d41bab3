import dataclasses
import functools
import time
from unittest import mock

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.mesh import shard
from cm3leon_jax.models import transformer
from cm3leon_jax.reports import summary as summary_lib
from cm3leon_jax.training import decoder
from cm3leon_jax.training.config import OptimizerConfig, TrainConfig
from cm3leon_jax.training.decoder import DecoderTraining, train
from cm3leon_jax.training.objective import RowObjective
from cm3leon_jax.training.step import loss
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import eval_step, init_state, train_step
from cm3leon_jax.training.watch import heldout
from cm3leon_jax.training.watch.monitor import change_line
from cm3leon_jax.training.watch.tensorboard_board import curves
from tests.data.stores import VOCAB, make_instructions, make_plan, make_sources
from tests.models.tiny import CONFIG, mesh_of, model_logits
from tests.training import events
from tests.training.runs import MODEL, Crash, crash_at, losses, shared_steps
from tests.training.step.state_test import S, marked_batch

OPTIMIZER = create_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=2), 10)
NAMES, STEPS = ("answers", "edits", "pairs"), 6


def test_source_sums_literal():
  nll, weights = jnp.array([[1.0, 2, 4, 9]]), jnp.array([[1, 1, 0.5, 0]])
  sums = loss.source_sums(nll, weights, jnp.array([[1, 1, 3, 0]]), 3)
  assert sums["source_nll"].tolist() == [3, 0, 2]
  assert sums["source_weight"].tolist() == [2, 0, 0.5]


def test_a_source_without_targets_has_no_loss():
  sums = {"source_nll": np.float32([3, 0]), "source_weight": np.float32([2, 0])}
  assert loss.source_losses(("count", "draw"), sums) == {"loss/count": 1.5}
  assert loss.source_losses((), {}) == {}


def step_in_two(num_sources):
  """Runs a train step with two micro-batches; returns its metrics and the new state."""
  with jax.set_mesh(mesh_of(1, 1, 1)):
    batch = {name: shard(jnp.asarray(x), "batch", "length") for name, x in marked_batch().items()}
    state = init_state(CONFIG, OPTIMIZER, jax.random.key(0))
    options = {"num_sources": num_sources}
    step = jax.jit(functools.partial(train_step, CONFIG, OPTIMIZER, 60, 2, **options))
    return jax.device_get(step(state, batch)[::-1])


@pytest.fixture(scope="module")
def marked():
  return step_in_two(S)


@pytest.fixture(scope="module")
def expected():
  batch = marked_batch()
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = transformer.init_params(CONFIG, jax.random.key(0))
    logits = model_logits(CONFIG, params, *(batch[n] for n in ("inputs", "positions")),
                          batch["segment_ids"])  # fmt: skip
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  nll = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
  values = (batch["loss_weights"] * nll, batch["loss_weights"])
  return [[x[batch["sources"] == i + 1].sum() for i in range(S)] for x in values]


def assert_sums(sums, expected):
  np.testing.assert_allclose(sums["source_nll"], expected[0], rtol=2e-5)
  np.testing.assert_allclose(sums["source_weight"], expected[1], rtol=1e-6)


def test_sums_of_a_step_in_two_parts_are_those_of_all_logits(expected, marked):
  """`state_test` covers the same sums on other meshes."""
  assert_sums(marked[0], expected)
  assert marked[0]["source_weight"][-1] == 0 < marked[0]["source_weight"][:-1].min()
  assert np.ptp(expected[0][:-1]) > 0.1


FURTHER = [
  pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 1, 1), (1, 8, 1), (1, 2, 2, 2))
]


@pytest.mark.parametrize("shape", [(2, 2, 2), *FURTHER])
def test_sums_of_an_evaluation_are_those_of_all_logits(expected, shape):
  with jax.set_mesh(mesh_of(*shape)):
    batch = {name: shard(jnp.asarray(x), "batch", "length") for name, x in marked_batch().items()}
    params = jax.jit(lambda: transformer.init_params(CONFIG, jax.random.key(0)))()
    evaluate = jax.jit(functools.partial(eval_step, CONFIG, 60, num_sources=S))
    assert_sums(jax.device_get(evaluate(params, batch)), expected)


def test_marks_change_neither_the_step_nor_its_other_metrics(marked):
  metrics, state = marked
  plain, plain_state = step_in_two(0)
  assert metrics.keys() - plain.keys() == set(loss.SOURCE_SUMS)
  assert {name: metrics[name] for name in plain} == plain
  jax.tree.map(np.testing.assert_array_equal, state, plain_state)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  """Returns three sources: two tasks, and pairs. Held-out rows have the same documents."""
  root = tmp_path_factory.mktemp("sources")
  tasks = [dataclasses.replace(s, share=0.3) for s in make_instructions(root)]
  pairs = dataclasses.replace(make_sources(root)[0], share=0.4, name="pairs")
  return [*tasks, pairs]


def loader_of(sources, mark_sources=True, **fields):
  plan = make_plan(sources, **{"sequence_length": 64, "pack_window": 32, **fields})
  return RowLoader(plan, VOCAB, mark_sources=mark_sources)


def test_a_row_names_the_source_of_each_position(sources):
  loader, plain = loader_of(sources), loader_of(sources, mark_sources=False)
  assert loader.source_names == NAMES
  assert plain.source_names == ()
  for i in range(20):
    row, placements = loader[i], loader.plan.row(i)
    assert row["sources"].dtype == np.int32
    samples = row["segment_ids"]
    numbers = np.array([0, *(placement.source + 1 for placement in placements)])
    np.testing.assert_array_equal(row["sources"], numbers[samples])
    assert row.keys() - plain[i].keys() == {"sources"}
    for name, values in plain[i].items():
      np.testing.assert_array_equal(row[name], values)


def tune(folder, loader, shape=(1, 1, 1), sample_grid=None, evaluate_start=True, **fields):
  """Trains as instruction tuning does: evaluates the initial parameters first."""
  config = TrainConfig(
    **{
      "steps": STEPS, "global_batch_size": 8, "eval_every": 4, "eval_batches": 1,
      "checkpoint_every": 2, **fields,
    }
  )  # fmt: skip

  def steps(model, optimizer, config, vocab, seed, adapter):
    mesh = jax.sharding.get_mesh()
    accumulation = config.gradient_accumulation_steps
    return shared_steps(model, optimizer, accumulation, vocab, seed, mesh, adapter)

  optimizer = OptimizerConfig(learning_rate=1e-2)
  arguments = (MODEL, optimizer, config, VOCAB, RowObjective(loader), loader, 0, sample_grid)
  with jax.set_mesh(mesh_of(*shape)), mock.patch.object(decoder, "compile_steps", steps):
    training = DecoderTraining(epath.Path(folder), *arguments, evaluate_start=evaluate_start)
    return train(training)


def log_of(folder):
  return read_json_lines(folder / "metrics" / "metrics.jsonl")


@pytest.fixture(scope="module")
def loader(sources):
  return loader_of(sources)


@pytest.fixture(scope="module")
def whole(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  return folder, tune(folder, loader)


def test_every_step_and_every_evaluation_logs_the_sources(whole, loader):
  steps = [line for line in log_of(whole[0]) if "loss" in line]
  for line in steps:
    weights, nll = np.zeros(3), 0.0
    for i in range(8 * (line["step"] - 1), 8 * line["step"]):
      row = loader[i]
      weights += np.bincount(row["sources"], row["loss_weights"], 4)[1:]
    found = {name: line[f"loss/{name}"] for name in NAMES if f"loss/{name}" in line}
    assert list(found) == [name for name, weight in zip(NAMES, weights) if weight]
    nll = sum(weights[NAMES.index(name)] * value for name, value in found.items())
    assert nll / weights.sum() == pytest.approx(line["loss"], rel=1e-5)
  evaluations = [line for line in log_of(whole[0]) if "heldout_loss" in line]
  assert heldout_steps(whole[0]) == [0, 4, STEPS]
  assert all(f"heldout_loss/{name}" in line for line in evaluations for name in NAMES)
  assert whole[1]["heldout_loss/edits"] == evaluations[-1]["heldout_loss/edits"]
  assert curves(evaluations[0]).keys() >= {"heldout_loss/edits", "heldout/loss"}
  assert set(events.read(whole[0] / "tensorboard")["loss/edits"]) <= set(range(1, STEPS + 1))


def by_source(folder):
  return {(x["step"], name): x[name] for x in log_of(folder) for name in x if "/" in name}


def heldout_steps(folder):
  return [line["step"] for line in log_of(folder) if "heldout_loss" in line]


@pytest.mark.slow
def test_a_step_without_a_source_has_no_value_of_it(sources, tmp_path):
  """Runs with --debug_nans: a source without tokens has weight 0, and nothing divides by it."""
  rare = [dataclasses.replace(s, share=x) for s, x in zip(sources, (0.96, 0.02, 0.02))]
  with jax.debug_nans(True):
    tune(tmp_path, loader_of(rare), steps=3, global_batch_size=1)
  lines = [line for line in log_of(tmp_path) if "loss" in line]
  values = [line.get("loss/pairs") for line in lines]
  assert None in values
  assert all("loss/answers" in line for line in lines)
  assert not any(value == 0 or np.isnan(value) for value in values if value is not None)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "accumulation"), [((2, 2, 2), 1), ((2, 2, 1), 2)])
def test_meshes_and_micro_batches_log_the_same(whole, loader, tmp_path, shape, accumulation):
  tune(tmp_path, loader, shape, steps=2, gradient_accumulation_steps=accumulation)
  expected = {line["step"]: line for line in log_of(whole[0]) if "loss" in line}
  expected[0] = next(line for line in log_of(whole[0]) if line["step"] == 0)
  for line in log_of(tmp_path):
    for name in (name for name in line if "/" in name and line["step"] < 2):
      assert line[name] == pytest.approx(expected[line["step"]][name], rel=1e-4), name


def test_rows_without_marks_log_nothing_of_sources(sources, tmp_path, capsys):
  summary = tune(tmp_path, loader_of(sources, mark_sources=False), steps=1, evaluate_start=False)
  assert not [name for line in log_of(tmp_path) for name in line if "/" in name]
  assert heldout_steps(tmp_path) == [1]
  assert "heldout_before" not in summary
  assert "by source" not in capsys.readouterr().out


def test_an_evaluation_prints_one_more_line(loader, tmp_path, capsys):
  tune(tmp_path, loader, steps=1)
  lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step 0/1 | held-out")]
  first = log_of(tmp_path)[0]
  shown = " ".join(f"{name} {first[f'heldout_loss/{name}']:.3f}" for name in NAMES)
  assert lines[1:] == [f"step 0/1 | held-out by source: {shown}"]
  assert lines[0].startswith(f"step 0/1 | held-out loss {first['heldout_loss']:.3f} image ")


def step_0_of(folder):
  return [line for line in log_of(folder) if line["step"] == 0]


def test_the_summary_has_the_losses_before_and_after(whole):
  evaluation, goodput = step_0_of(whole[0])
  before = {name: value for name, value in evaluation.items() if name.startswith("heldout")}
  assert whole[1]["heldout_before"] == before
  assert before["heldout_loss"] > whole[1]["heldout_loss"] + 0.3
  assert "goodput" in goodput
  report = summary_lib.training(log_of(whole[0]))
  assert report["every_step_logged_once"]
  assert report["logged_steps"] == STEPS
  assert report["restarts"] == []


@pytest.mark.parametrize("killed_in", [1, 5])
def test_a_killed_run_has_step_0_once(whole, loader, tmp_path, killed_in):
  """A run killed before its first checkpoint evaluates step 0 again; otherwise it reads the log."""
  with pytest.raises(Crash):
    tune(tmp_path, loader, sample_grid=crash_at(killed_in, tmp_path), sample_every=1)
  time.sleep(1)  # Otherwise a restart in the same second would overwrite the event file.
  with mock.patch.object(heldout, "evaluate", wraps=heldout.evaluate) as evaluate:
    summary = tune(tmp_path, loader)
  resumed_at = [line["from_step"] for line in log_of(tmp_path) if line.get("event") == "resumed"]
  assert evaluate.call_count == sum(step > (*resumed_at, -1)[0] for step in (0, 4, STEPS))
  assert summary == whole[1]
  assert by_source(tmp_path) == by_source(whole[0])
  assert losses(tmp_path) == losses(whole[0])
  assert [set(line) & {"heldout_loss", "goodput"} for line in step_0_of(tmp_path)] == [
    {"heldout_loss"},
    {"goodput"},
  ]
  assert heldout_steps(tmp_path) == [0, 4, STEPS]
  board = events.read(tmp_path / "tensorboard")["heldout/loss"]
  assert {step: len(values) for step, values in board.items()} == {0: 1, 4: 1, STEPS: 1}
  report = summary_lib.training(log_of(tmp_path))
  assert report["every_step_logged_once"]
  assert len(report["restarts"]) == (killed_in == 5)


def test_the_line_of_before_and_after():
  before = {"heldout_loss": 3.0, "heldout_image_loss": 4.0, "heldout_text_loss": 2.0}
  after = {name: value / 2 for name, value in before.items()}
  assert change_line(before, after) == (
    "train: held-out loss before -> after: loss 3.000 -> 1.500, image 4.000 -> 2.000, "
    "text 2.000 -> 1.000 nats per target"
  )
  before |= {"heldout_loss/count": 5.0, "heldout_loss/pairs": 1.0}
  after |= {"heldout_loss/count": 0.5, "heldout_loss/pairs": 1.25}
  assert change_line(before, after) == (
    "train: held-out loss before -> after: count 5.000 -> 0.500, pairs 1.000 -> 1.250 "
    "nats per target"
  )
  # The line has only sources that both evaluations have.
  del after["heldout_loss/count"]
  assert change_line(before, {**after, "steps": 3, "heldout_before": before}) == (
    "train: held-out loss before -> after: pairs 1.000 -> 1.250 nats per target"
  )
  del after["heldout_loss/pairs"]
  assert "after: loss 3.000 -> 1.500, image" in change_line(before, after)
