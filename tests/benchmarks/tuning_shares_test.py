import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tuning_shares
from benchmarks.tuning_shares import Gradients, Sums
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.models import transformer
from tests.data.stores import VOCAB, make_instructions, make_plan, make_sources
from tests.models.tiny import mesh_of, model_logits
from tests.training.runs import MODEL

PARTS = 3


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stores")
  tasks = [dataclasses.replace(source, share=0.25) for source in make_instructions(folder)]
  [pairs, _] = make_sources(folder)
  sources = [*tasks, dataclasses.replace(pairs, share=0.5, name="pairs")]
  return RowLoader(make_plan(sources, sequence_length=64), VOCAB, mark_sources=True)


def sums_of(parts, weights):
  parts = np.asarray(parts, np.float64)
  return Sums(parts.sum(0), float((parts**2).sum()), np.asarray(weights, np.float64))


def test_the_gradient_of_the_whole_loss_is_the_weighted_sum_of_its_sources(loader):
  batches = []
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = jax.jit(functools.partial(transformer.init_params, MODEL))(jax.random.key(0))
    compute = tuning_shares.gradient_of(MODEL)

    def gradient(batch):
      batches.append(batch)
      return compute(params, batch)

    found = [tuning_shares.sums_of(loader, number, PARTS, 1, gradient) for number in range(3)]
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def mean_loss(params):
      inputs = (rows[name] for name in ("inputs", "positions"))
      logits = model_logits(MODEL, params, *inputs, rows["segment_ids"])
      hit = rows["loss_weights"][..., None] * (np.arange(VOCAB.size) == rows["targets"][..., None])
      return -jnp.sum(hit * jax.nn.log_softmax(logits)) / rows["loss_weights"].sum()

    grads = jax.device_get(jax.grad(mean_loss)(params))
  expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])
  weight = sum(source.weights.sum() for source in found)
  assert weight == pytest.approx(rows["loss_weights"].sum())
  total = sum(source.gradient for source in found) / weight
  np.testing.assert_allclose(total, expected, atol=2e-5 * np.abs(expected).max())
  assert np.abs(expected).max() > 1e-2


def test_products_are_means_over_pairs_of_different_parts():
  parts = np.random.default_rng(0).normal(1, 2, (2, PARTS, 5))
  found = tuning_shares.gradients_of([sums_of(x, np.full(PARTS, 4.0)) for x in parts])
  scaled = parts / 4
  for source in range(2):
    pairs = [scaled[source, i] @ scaled[source, j] for i in range(3) for j in range(3) if i != j]
    assert found.products[source, source] == pytest.approx(np.mean(pairs))
  assert found.products[0, 1] == pytest.approx(scaled[0].mean(0) @ scaled[1].mean(0))
  np.testing.assert_allclose(found.variances, 4 * scaled.var(1, ddof=1).sum(1))
  assert found.weights.tolist() == [12, 12]


def test_contributions_in_literals():
  gradients = Gradients(np.array([[4.0, 0], [0, 1]]), np.array([1.0, 3]), np.array([2.0, 2]))
  found = tuning_shares.contributions(gradients, np.array([0.5, 0.5]), 8.0)
  assert found["norm"] == pytest.approx([2 / 3, 1 / 3])
  assert found["gradient"] == pytest.approx([0.8, 0.2])
  assert found["noise"] == pytest.approx([0.25, 0.75])
  assert found["cosine"].tolist() == [0, 0]
  assert found["total"] ** 2 == pytest.approx(1.25)
  assert found["norms"] == pytest.approx([1, 0.5])
  assert found["errors"] ** 2 == pytest.approx([0.25 / 2, 0.25 * 3 / 2])
  assert found["error"] ** 2 == pytest.approx(0.25 * (1 + 3) / 2)
  assert found["step_deviation"] ** 2 == pytest.approx(0.5 * (1 + 3) / 8)


def test_shares_sum_to_one_and_opposed_gradients_have_negative_components():
  means = np.random.default_rng(0).normal(size=(4, 6))
  means[3] = -means[:3].mean(0)
  gradients = Gradients(means @ means.T, np.arange(1.0, 5), np.ones(4))
  loss_shares = np.array([0.4, 0.3, 0.2, 0.1])
  found = tuning_shares.contributions(gradients, loss_shares, 1.0)
  for name in ("norm", "gradient", "noise"):
    assert found[name].sum() == pytest.approx(1)
  whole = loss_shares @ means
  assert found["gradient"] == pytest.approx(loss_shares * (means @ whole) / (whole @ whole))
  assert found["gradient"][3] < 0 > found["cosine"][3]
  others = whole - loss_shares[3] * means[3]
  norms = np.linalg.norm(means[3]) * np.linalg.norm(others)
  assert found["cosine"][3] == pytest.approx(means[3] @ others / norms)


def test_norms_that_the_rows_do_not_resolve_are_nan():
  gradients = Gradients(np.array([[-1.0, 0], [0, 4]]), np.ones(2), np.ones(2))
  found = tuning_shares.contributions(gradients, np.array([0.5, 0.5]), 1.0)
  np.testing.assert_array_equal(found["norm"], [np.nan, 1])
  assert np.isnan(found["cosine"]).all()
  assert tuning_shares.without_nan(found["cosines"]) == [[None, None], [None, 1.0]]


def test_the_table_in_literals():
  shares = {"source_shares": [0.4, 0.6], "target_shares": [0.02, 1], "loss_shares": [0.1, 0.9]}
  values = {"norm": [0.25, 0.75], "gradient": [-0.1, 1.1], "noise": [0.5, 0.5]}
  values |= {"cosine": [-0.125, -0.125], "norms": [0.1, 0.3], "errors": [0.2, 0.2]}
  assert tuning_shares.table(["count", "draw"], shares, {"a": values}).split("\n")[2:] == [
    "| count | 40.0% | 2.0% | 10.0% | - | -10.0% | 50.0% | - |",
    "| draw | 60.0% | 100.0% | 90.0% | 75.0% | 110.0% | 50.0% | -0.12 |",
    "",
  ]
