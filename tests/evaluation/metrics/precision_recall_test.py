import numpy as np
import pytest
from scipy.spatial import distance

from cm3leon_jax.errors import UserError
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


@pytest.mark.parametrize(("neighbors", "scale"), [(1, 0.6), (3, 1.0), (5, 1.5)])
def test_values_are_those_of_the_definition(neighbors, scale):
  generated, real = two_sets(scale=scale)
  assert precision_recall(generated, real, neighbors) == {
    "precision": share_inside(generated, real, neighbors),
    "recall": share_inside(real, generated, neighbors),
  }


def test_copies_of_an_image_lie_in_a_ball_without_radius():
  rng = np.random.default_rng(0)
  copies = np.repeat(rng.normal(1000, 1, (2, 64)), 5, axis=0).astype(np.float32)
  assert precision_recall(copies[:5], copies) == {"precision": 1.0, "recall": 0.5}
  copies = np.repeat(rng.normal(1, 1, (20, 333)), 5, axis=0).astype(np.float32)
  assert precision_recall(copies[:20:2], copies)["precision"] == 1.0


def test_blocks_do_not_change_the_values(monkeypatch):
  generated, real = two_sets()
  whole = precision_recall(generated, real)
  for block in (2, 50, 210, 230):
    monkeypatch.setattr(module, "BLOCK", block)
    assert precision_recall(generated, real) == whole


def test_torch_fidelity_has_the_same_values():
  oracle = pytest.importorskip("torch_fidelity.metric_prc")
  torch = pytest.importorskip("torch")
  generated, real = two_sets(n=700, m=650)

  def theirs(**options):
    sets = torch.tensor(generated), torch.tensor(real)
    found = oracle.prc_features_to_metric(*sets, verbose=False, **options)
    return {key: found[key] for key in ("precision", "recall")}

  ours = precision_recall(generated, real)
  assert theirs() == pytest.approx(ours, abs=1e-7)  # torch-fidelity averages in float32.
  assert theirs(prc_neighborhood=4) != pytest.approx(ours, abs=1e-3)


def test_sets_without_enough_neighbors_are_refused():
  rows = np.arange(6.0).reshape(6, 1)
  for sets in ((rows[:3], rows), (rows, rows[:3])):
    with refused(UserError, "more than 3 images", "3"):
      precision_recall(*sets)
