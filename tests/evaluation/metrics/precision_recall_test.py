import tracemalloc

import numpy as np
import pytest
from scipy import stats
from scipy.spatial import distance

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import precision_recall as module
from cm3leon_jax.evaluation.metrics.precision_recall import precision_recall
from tests.refusals import refused


def two_sets(seed=0, n=230, m=210, width=6, scale=0.8):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, width)) * scale + 0.3, rng.normal(size=(m, width))


def share_inside(rows, others, neighbors):
  """Follows the definition. Sorted distances start with the distance of a row to itself."""
  radii = np.sort(distance.cdist(others, others), axis=1)[:, neighbors]
  return (distance.cdist(rows, others) <= radii).any(1).mean()


def test_values_are_those_of_the_docstring():
  found = precision_recall([[0], [1], [9]], [[2], [4.5], [5]], neighbors=1)
  assert found == {"precision": 2 / 3, "recall": 1.0}


@pytest.mark.parametrize("neighbors", [1, 3, 5])
@pytest.mark.parametrize("scale", [0.6, 1.0, 1.5])
def test_values_are_those_of_the_definition(neighbors, scale):
  generated, real = two_sets(scale=scale)
  assert precision_recall(generated, real, neighbors) == {
    "precision": share_inside(generated, real, neighbors),
    "recall": share_inside(real, generated, neighbors),
  }


def test_a_set_has_all_of_itself_and_none_of_a_far_one():
  generated, real = two_sets()
  assert precision_recall(real, real[::-1]) == {"precision": 1.0, "recall": 1.0}
  assert precision_recall(generated, real + 100) == {"precision": 0.0, "recall": 0.0}


def test_copies_of_an_image_lie_in_a_ball_without_radius():
  rng = np.random.default_rng(0)
  copies = np.repeat(rng.normal(1000, 1, (2, 64)), 5, axis=0).astype(np.float32)
  assert precision_recall(copies[:5], copies) == {"precision": 1.0, "recall": 0.5}
  copies = np.repeat(rng.normal(1, 1, (20, 333)), 5, axis=0).astype(np.float32)
  assert precision_recall(copies[:20:2], copies)["precision"] == 1.0


def test_few_modes_have_precision_and_many_outliers_recall():
  real = np.random.default_rng(0).normal(size=(200, 6))
  narrow = precision_recall(0.2 * real[:150], real)
  wide = precision_recall(3 * real[:150], real)
  assert narrow["precision"] > 0.95 > 0.5 > narrow["recall"]
  assert wide["recall"] > 0.95 > 0.5 > wide["precision"]


@pytest.mark.parametrize("seed", range(3))
def test_properties_of_the_values(seed):
  generated, real = two_sets(seed)
  found = precision_recall(generated, real)
  assert 0.2 < found["recall"] < found["precision"] < 1
  assert precision_recall(real, generated) == {
    "precision": found["recall"],
    "recall": found["precision"],
  }
  turn = stats.ortho_group.rvs(real.shape[1], random_state=seed)
  assert precision_recall(generated @ turn, real @ turn) == found
  assert precision_recall(5 * generated + 1e6, 5 * real + 1e6) == found
  assert precision_recall(generated[::-1], real) == found


def test_blocks_do_not_change_the_values(monkeypatch):
  generated, real = two_sets()
  whole = precision_recall(generated, real)
  for block in (2, 50, 210, 230):
    monkeypatch.setattr(module, "BLOCK", block)
    assert precision_recall(generated, real) == whole


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.5])
def test_torch_fidelity_has_the_same_values(scale):
  oracle = pytest.importorskip("torch_fidelity.metric_prc")
  torch = pytest.importorskip("torch")
  generated, real = two_sets(n=700, m=650, scale=scale)

  def theirs(**options):
    sets = torch.tensor(generated), torch.tensor(real)
    found = oracle.prc_features_to_metric(*sets, verbose=False, **options)
    return {key: found[key] for key in ("precision", "recall")}

  ours = precision_recall(generated, real)
  assert theirs() == pytest.approx(ours, abs=1e-7)  # torch-fidelity averages in float32.
  assert theirs(prc_neighborhood=4) != pytest.approx(ours, abs=1e-3)


@pytest.mark.slow
def test_memory_is_that_of_a_block_and_not_of_all_pairs():
  n = 5_000
  generated, real = two_sets(n=n, m=n)
  tracemalloc.start()
  precision_recall(generated, real)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 0.3 * n * n * 8


def test_sets_that_cannot_be_compared_are_refused():
  generated, real = two_sets(n=3)
  with refused(UserError):
    precision_recall(generated, real)
  with refused(UserError):
    precision_recall(real, real[:, 1:])
  with refused(UserError):
    precision_recall(real, real, neighbors=0)
