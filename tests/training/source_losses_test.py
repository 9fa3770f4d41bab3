import dataclasses
import functools
import time
from unittest import mock

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cm3leon_jax.config.training import OptimizerConfig, TrainConfig
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.models import transformer
from cm3leon_jax.reports import summary as summary_lib
from cm3leon_jax.training import decoder
from cm3leon_jax.training.decoder import DecoderTraining, train
from cm3leon_jax.training.objective import RowObjective
from cm3leon_jax.training.step import loss
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import eval_step
from cm3leon_jax.training.watch import heldout
from cm3leon_jax.training.watch.boards import curves
from cm3leon_jax.training.watch.monitor import change_line
from tests.data.stores import VOCAB, make_instructions, make_plan, make_sources
from tests.models.tiny import CONFIG, mesh_of, model_logits, place
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


@pytest.fixture(scope="module")
def expected():
  batch = marked_batch()
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = jax.jit(functools.partial(transformer.init_params, CONFIG))(jax.random.key(0))
    logits = model_logits(CONFIG, params, *(batch[n] for n in ("inputs", "positions")),
                          batch["segment_ids"])  # fmt: skip
  log_probs = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
  nll = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
  values = (batch["loss_weights"] * nll, batch["loss_weights"])
  return [[x[batch["sources"] == i + 1].sum() for i in range(S)] for x in values]


def assert_sums(sums, expected):
  np.testing.assert_allclose(sums["source_nll"], expected[0], rtol=2e-5)
  np.testing.assert_allclose(sums["source_weight"], expected[1], rtol=1e-6)


def test_sums_of_an_evaluation_are_those_of_all_logits(expected):
  with jax.set_mesh(mesh_of(2, 2, 2)):
    batch = {name: place(x, "batch", "length") for name, x in marked_batch().items()}
    params = jax.jit(lambda: transformer.init_params(CONFIG, jax.random.key(0)))()
    evaluate = jax.jit(functools.partial(eval_step, CONFIG, 60, num_sources=S))
    assert_sums(jax.device_get(evaluate(params, batch)), expected)


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

  def steps(model, optimizer, config, vocab, seed, tuned):
    mesh = jax.sharding.get_mesh()
    accumulation = config.gradient_accumulation_steps
    return shared_steps(model, optimizer, accumulation, vocab, seed, mesh, tuned)

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


def test_a_killed_run_has_step_0_once(whole, loader, tmp_path):
  """The run reads the losses of step 0 from its log."""
  with pytest.raises(Crash):
    tune(tmp_path, loader, sample_grid=crash_at(5, tmp_path), sample_every=1)
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
  assert len(report["restarts"]) == 1


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
