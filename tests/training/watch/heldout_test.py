"""Tests the held-out loss: targets are in the document, after neighbors of its caption."""

import dataclasses

from etils import epath
import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from cm3leon_jax.config.settings import default_config, settings_from_config
from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.rows.loader import RowLoader, join
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.mesh import spec
from cm3leon_jax.run.rows import open_rows
from cm3leon_jax.training.steps import compile_steps
from cm3leon_jax.training.watch.heldout import HeldoutLosses, decisive, evaluate, heldout_batches
from tests.data.stores import VOCAB, make_sources
from tests.models.tiny import mesh_of, random_params
from tests.retrieval.stores import write_neighbors
from tests.training.fakes import FakeMonitor, FakeState, FakeStop

HELDOUT, TRAIN = 24, 50


@pytest.fixture(scope="module")
def settings():
  config = default_config()
  config.vocab.update(dataclasses.asdict(VOCAB))
  config.model.update({"vocab_size": VOCAB.size, "num_layers": 2, "width": 16, "num_heads": 2})
  config.model.update({"mlp_width": 32, "max_positions": 64, "dtype": "float32"})
  # A window is one pass over the held-out pairs. Rows of 64 tokens have space for a document with
  # one or two neighbors.
  config.data.update({"sequence_length": 64, "pack_window": HELDOUT, "text_share": 0.0})
  config.train.update({"global_batch_size": 4, "eval_batches": 1})
  config.evaluation.update({"num_documents": HELDOUT, "num_resamples": 100})
  return settings_from_config(config)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Makes different training and held-out pairs. Image and caption have different neighbors."""
  root = tmp_path_factory.mktemp("heldout")
  (root / "documents").mkdir()
  for split, count, seed in (("train", TRAIN, 0), ("heldout", HELDOUT, 1)):
    make_sources(root / split, num_pairs=count, seed=seed)
    (root / "documents" / f"{split}_pairs").symlink_to(root / split / "pairs")
  rng = np.random.default_rng(2)
  ids, text_ids = rng.permuted(np.tile(np.arange(TRAIN, dtype=np.int32), (2, HELDOUT, 1)), axis=2)
  text_ids[3, 1:] = -1
  write_neighbors(root / "neighbors" / "heldout_pairs", ids=ids[:, :4], text_ids=text_ids[:, :4])
  return epath.Path(root)


@pytest.fixture(scope="module")
def mesh():
  with jax.set_mesh(mesh_of(2, 1, 1)):
    yield jax.sharding.get_mesh()


@pytest.fixture(scope="module")
def losses(settings, mesh):
  """Returns a function of (rows, number of rows) that computes the losses that training logs."""
  params = random_params(settings.model)
  steps = compile_steps(settings.model, settings.optimizer, settings.train, VOCAB, seed=0)
  sharding = NamedSharding(mesh, spec("batch", "length"))

  def measure(rows, count, **fields):
    train = dataclasses.replace(settings.train, global_batch_size=count, **fields)
    found = heldout_batches(rows, train, sharding)
    return evaluate(steps, found, (), params), [batch["inputs"].shape[0] for batch in found]

  return measure


def test_a_row_holds_the_documents_after_their_best_neighbors_and_scores_the_documents(
  settings, workdir
):
  rows = open_rows(settings, workdir, "heldout")
  pairs, bank = rows.plan.sources[0].store, rows.plan.sources[0].bank
  ids = np.asarray(rows.plan.sources[0].neighbors)
  seen, neighbors = set(), 0
  for number in range(len(rows.plan.window(0))):
    row, expected, scored = rows[number], [], []
    for placement in rows.plan.row(number):
      document = pairs[placement.unit]
      near = [bank[int(i)] for i in ids[placement.unit][:2] if i >= 0]
      near = bits.fit_neighbors(document, near, settings.data.sequence_length, VOCAB)
      seen.add(placement.unit)
      neighbors += len(near)
      expected.append(join([*near, document], VOCAB)[1:])
      scored.append(join([document], VOCAB)[1:])
    used = row["segment_ids"] > 0
    np.testing.assert_array_equal(row["targets"][used], np.concatenate(expected))
    assert set(row["loss_weights"]) <= {0.0, 1.0}
    np.testing.assert_array_equal(row["targets"][row["loss_weights"] == 1], np.concatenate(scored))
  assert seen == set(range(HELDOUT))
  assert HELDOUT < neighbors < 2 * HELDOUT


def test_the_image_loss_is_that_of_evaluation_on_the_same_documents(settings, workdir, losses):
  rows = open_rows(settings, workdir, "heldout")
  count = len(rows.plan.window(0))
  found, _ = losses(rows, count)
  stores = [
    DocumentStore(workdir / "documents" / f"{split}_pairs", VOCAB) for split in ("train", "heldout")
  ]
  ids = np.asarray(rows.plan.sources[0].neighbors)
  metrics = bits.evaluate(
    random_params(settings.model), settings.model, *stores, ids, VOCAB, settings.data,
    settings.evaluation, seed=0,
  )  # fmt: skip
  assert metrics["documents"] == HELDOUT
  assert metrics["image"]["tokens"] == 16 * HELDOUT
  expected = metrics["image"]["true"]["bits"]
  assert found["heldout_image_loss"] / np.log(2) == pytest.approx(expected, rel=1e-5)
  assert metrics["image"]["none"]["bits"] != pytest.approx(expected, rel=1e-4), (
    "neighbors must matter"
  )
  scored = dataclasses.replace(settings.data.for_heldout(), neighbor_loss_weight=1.0)
  plan = RowPlan(rows.plan.sources, scored, VOCAB, settings.seed)
  with_neighbors, _ = losses(RowLoader(plan, VOCAB), count)
  assert with_neighbors["heldout_image_loss"] != pytest.approx(
    found["heldout_image_loss"], rel=1e-4
  ), "the loss must count only targets of the document"


def losses_of(params):
  return {"heldout_loss": float(len(params))}


def test_the_average_is_evaluated_every_few_steps_and_at_the_end():
  monitor, found = FakeMonitor(), losses_of("average")
  hook = HeldoutLosses(losses_of, TrainConfig(steps=5, eval_every=2), monitor, FakeStop())
  hook.begin(FakeState(0))
  assert monitor.events == []
  hook.after(1, FakeState(1), {})
  assert hook.losses is None
  for step in range(2, 6):
    hook.after(step, FakeState(step), {})
  assert monitor.events == [
    part for step in (2, 4, 5) for part in (f"evaluate {step}", (step, found), "end")
  ]
  assert (hook.losses, hook.at_start) == (found, {})


def test_step_0_is_evaluated_by_a_new_run_and_read_by_a_continued_one():
  monitor = FakeMonitor(logged={0: {"heldout_loss": 3.0}})
  options = losses_of, TrainConfig(), monitor, FakeStop()
  new = HeldoutLosses(*options, evaluate_start=True)
  new.begin(FakeState(0))
  assert new.at_start == {"heldout_loss": 7}
  assert monitor.events == ["evaluate 0", (0, {"heldout_loss": 7}), "end"]
  continued = HeldoutLosses(*options, evaluate_start=True, newest=4)
  continued.begin(FakeState(4))
  assert continued.at_start == {"heldout_loss": 3.0}
  assert new.losses is continued.losses is None


def risen(losses, limit, newest=None, logged=()):
  """Returns a hook that has evaluated step 0 and then `losses` of the base's documents."""
  values = iter(losses)
  monitor = FakeMonitor(logged=dict(logged))
  config = TrainConfig(steps=9, eval_every=1, max_forgetting=limit)

  def evaluate(_):
    return {"heldout_loss": 5.0, "heldout_loss/base": next(values)}

  hook = HeldoutLosses(evaluate, config, monitor, FakeStop(), evaluate_start=True, newest=newest)
  hook.begin(FakeState(newest or 0))
  return hook


def test_a_training_ends_when_the_loss_of_the_base_has_risen_by_more_than_the_limit():
  hook = risen([2.0, 2.05, 2.07], 0.03)
  assert hook.risen() == 0
  for step, ends in ((1, False), (2, True)):
    hook.after(step, FakeState(step), {})
    assert hook.stops() == ends
  assert hook.risen() == pytest.approx(0.035)
  free = risen([2.0, 9.0], 0.0)
  free.after(1, FakeState(1), {})
  assert not free.stops()


def test_a_continued_training_compares_with_the_loss_of_step_0_that_it_logged():
  hook = risen([2.2], 0.03, newest=4, logged={0: {"heldout_loss/base": 2.0}})
  hook.after(5, FakeState(5), {})
  assert hook.stops()
  unknown = risen([2.2], 0.03, newest=4)
  unknown.after(5, FakeState(5), {})
  assert not unknown.stops()


def test_a_tuning_is_judged_by_its_own_pairs():
  losses = {"heldout_loss": 3.0, "heldout_image_loss": 2.0, "heldout_text_loss": 4.0}
  assert decisive(losses) == "heldout_image_loss"
  assert decisive({**losses, "heldout_image_loss": 0.0}) == "heldout_loss"
  tuning = {**losses, "heldout_loss/pairs": 1.0, "heldout_loss/base": 5.0}
  assert decisive(tuning) == "heldout_loss/pairs"
  del tuning["heldout_loss/base"]
  assert decisive(tuning) == "heldout_image_loss"
