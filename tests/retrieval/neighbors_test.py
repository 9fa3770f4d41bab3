import dataclasses

import numpy as np
import pytest

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.config.data import RetrievalConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.retrieval import neighbors
from cm3leon_jax.retrieval.neighbors import Retriever, select_neighbors
from tests.refusals import refused
from tests.retrieval.stores import write_bank, write_neighbors

EXACT = RetrievalConfig(backend="exact")


def at_angles(*degrees):
  """Returns 2D unit vectors at angles in degrees; the cosine of 25.8 degrees is 0.9."""
  radians = np.deg2rad(degrees)
  return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


VECTORS = at_angles(10, 40, 50, 80, 85, 110, 140)  # Documents 0 to 6, for a query at 0 degrees.


def select(sides, own_group=(), kept=2, limit=0.9, vectors=VECTORS, least=-1.0):
  sides, query = [np.array(side) for side in sides], at_angles(0)[0]
  forbidden = own_group.__contains__
  ids, rejected = select_neighbors(sides, vectors, query, forbidden, kept, limit, least)
  return ids, dict(rejected)


def test_selection_in_literals():
  vectors = at_angles(0, 0, 0, 40, 0, 60, 0, 0, 85, 50)
  rejected = {"own_group": 1, "similar_to_kept": 2}
  assert select([[5, 3, 8], [3, 9, 8]], {5}, 1, vectors=vectors) == ([3, 8], rejected)


def test_similar_to_the_query_is_skipped():
  assert select([[0, 1, 3], [5, 6]]) == ([1, 5, 3, 6], {"similar_to_query": 1})
  assert select([[0, 1], [5, 6]], limit=0.99)[0] == [0, 5, 1, 6]  # Negative control.


def test_unlike_the_query_is_skipped():
  """Skips the document at 80 degrees, whose cosine is 0.17; that of 50 degrees is 0.64."""
  assert select([[1, 3, 2], [6, 5]], limit=0.999, least=0.5) == ([1, 2], {"unlike_query": 3})
  assert select([[3, 4], [6, 5]], least=0.5) == ([], {"unlike_query": 4})
  assert select([[1, 3, 2], [6, 5]], limit=0.999, least=0.1)[0] == [1, 3]  # Negative control.


def test_similar_to_a_kept_one_is_skipped():
  assert select([[1, 2, 3], [4, 6]]) == ([1, 4, 6], {"similar_to_kept": 2})
  assert select([[1, 2, 3], [4, 6]], limit=0.997)[0] == [1, 4, 2, 6]  # Negative control.


@dataclasses.dataclass
class Bank:
  """Random embeddings of pairs, two pairs per group."""

  texts: np.ndarray
  images: np.ndarray
  groups: np.ndarray
  keys: np.ndarray

  def retriever(self, folder, config=EXACT) -> Retriever:
    write_bank(folder / "train", self.texts, self.images, self.groups, self.keys)
    return Retriever(folder, config)


def bank_of(n, seed=0, size=8):
  rng = np.random.default_rng(seed)
  texts, images = (
    np.asarray(clip_lib.normalize(rng.normal(size=(n, size)).astype(np.float32))) for _ in range(2)
  )
  return Bank(
    texts, images, np.array([f"g{i // 2}" for i in range(n)]), np.array([f"k{i}" for i in range(n)])
  )


def neighbors_of(retriever):
  """Returns the neighbors of each document in the bank."""
  bank = retriever.bank
  queries, images, documents = (
    array[:].astype(np.float32) for array in (bank.queries, bank.images, bank.documents)
  )
  sides = [retriever.search(queries), retriever.search(images)]
  kept = retriever.config.kept_per_side
  return retriever.select(sides, documents, bank.keys[:], bank.groups[:], kept)


def test_the_rules_hold_on_a_bank(tmp_path, monkeypatch):
  monkeypatch.setattr(neighbors, "SELECT_BATCH", 7)
  bank = bank_of(40)
  retriever = bank.retriever(tmp_path)
  ids, scores, rejected = neighbors_of(retriever)
  assert ids.shape == scores.shape == (40, 4)
  assert (ids.dtype, scores.dtype) == (np.int32, np.float32)
  assert rejected["own_group"] > 0
  vectors = retriever.bank.documents[:].astype(np.float32)
  for i, row in enumerate(ids):
    kept = row[row >= 0]
    assert (row[len(kept) :] == -1).all()
    assert not (bank.groups[kept] == bank.groups[i]).any()
    assert (vectors[kept] @ vectors[i] <= 0.9).all()
    assert (np.triu(vectors[kept] @ vectors[kept].T, 1) <= 0.9).all()
    np.testing.assert_allclose(scores[i, : len(kept)], vectors[kept] @ vectors[i], atol=1e-6)


def test_the_order_of_the_bank_does_not_matter(tmp_path):
  bank, order = bank_of(24), np.random.default_rng(0).permutation(24)
  shuffled = Bank(*(getattr(bank, field.name)[order] for field in dataclasses.fields(Bank)))

  def names(bank, ids):
    return np.where(ids >= 0, bank.keys[ids], "")

  expected = names(bank, neighbors_of(bank.retriever(tmp_path / "a"))[0])
  np.testing.assert_array_equal(
    names(shuffled, neighbors_of(shuffled.retriever(tmp_path / "b"))[0]), expected[order]
  )


def test_retrieval_by_caption_is_best_first(tmp_path):
  bank = bank_of(30)
  retriever = bank.retriever(tmp_path)
  ids, scores = retriever.retrieve(bank.texts[:5])
  assert ids.shape == (5, 4)
  assert (np.diff(scores, axis=1) <= 0).all()
  documents = retriever.bank.documents[:].astype(np.float32)
  np.testing.assert_allclose(scores, (bank.texts[:5, None] * documents[ids]).sum(-1), atol=1e-6)
  assert (ids[0] != retriever.retrieve(bank.texts[5:6])[0][0]).any()


@pytest.mark.parametrize("wrong", [-5, 30, 2**31 - 1])
def test_neighbors_outside_of_the_bank_are_refused(tmp_path, wrong):
  ids = np.array([[3, 1, -1, -1], [29, 0, 4, 2]], np.int32)
  write_neighbors(tmp_path / "train_pairs", ids=ids)
  np.testing.assert_array_equal(neighbors.load_neighbors(tmp_path, "train_pairs", bank=30), ids)
  ids[1, 2] = wrong
  write_neighbors(tmp_path / "train_pairs", ids=ids)
  with refused(UserError, "row 1", str(wrong)):
    neighbors.load_neighbors(tmp_path, "train_pairs", bank=30)
