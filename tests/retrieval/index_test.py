import jax
import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.retrieval import index
from tests.refusals import refused


def unit(values):
  return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def clustered():
  """Returns 2,000 vectors in 40 clusters, and 100 queries near some of the vectors."""
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(40, 32))
  vectors = unit(centers[rng.integers(0, 40, 2_000)] + 0.7 * rng.normal(size=(2_000, 32)))
  return vectors, unit(vectors[:100] + 0.05 * rng.normal(size=(100, 32)))


def oracle(vectors, queries, k):
  return np.argsort(
    -(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1, kind="stable"
  )[:, :k]


def test_exact_search_is_the_oracle(clustered):
  vectors, queries = clustered
  ids, scores = index.ExactIndex(vectors).search(queries, 5)
  assert ids.dtype == np.int32
  assert scores.dtype == np.float32
  np.testing.assert_array_equal(ids, oracle(vectors, queries, 5))
  np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, ids, 1), atol=1e-6)
  # Negative control: other queries.
  assert index.recall_at_k(ids, oracle(vectors, np.roll(queries, 1, 0), 5)) < 0.5


def test_blocks_and_devices_do_not_matter(clustered, monkeypatch):
  vectors, queries = clustered
  vectors = vectors[:333]  # 333 is a multiple of neither 8 (devices) nor the block size.
  expected = index.ExactIndex(vectors, jax.devices()[:1]).search(queries[:9], 20)
  monkeypatch.setattr(index, "BLOCK", 16)
  for devices in (jax.devices(), jax.devices()[:3]):
    ids, scores = index.ExactIndex(vectors, devices).search(queries[:9], 20)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(scores, expected[1], atol=1e-6)
  np.testing.assert_array_equal(expected[0], oracle(vectors, queries[:9], 20))


def test_equal_scores_come_in_the_order_of_their_ids():
  ids, _ = index.ExactIndex(np.ones((20, 2))).search(np.ones((1, 2)), 20)
  assert ids.tolist() == [list(range(20))]


def test_batches_do_not_matter(clustered):
  vectors, queries = clustered
  many = np.concatenate([queries] * 4)
  ids, _ = index.ExactIndex(vectors).search(many, 3)
  assert len(many) > index.QUERY_BATCH
  np.testing.assert_array_equal(
    ids, np.concatenate([index.ExactIndex(vectors).search(queries, 3)[0]] * 4)
  )
  few = index.ExactIndex(vectors, query_batch=3).search(queries, 3)[0]
  np.testing.assert_array_equal(few, ids[: len(queries)])
  assert index.ExactIndex(vectors).search(many[:0], 3)[0].shape == (0, 3)


def test_scann_agrees_with_exact_search(clustered, tmp_path, monkeypatch):
  pytest.importorskip("scann")
  vectors, queries = clustered
  scann = index.ScannIndex.build(vectors)
  ids, scores = scann.search(queries, 2)
  assert index.recall_at_k(ids, oracle(vectors, queries, 2)) >= 0.95
  # Negative control: other queries.
  assert index.recall_at_k(ids, oracle(vectors, np.roll(queries, 1, 0), 2)) < 0.5
  np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, ids, 1), atol=1e-5)
  monkeypatch.chdir(tmp_path)
  scann.save("relative")
  (tmp_path / "relative").rename(tmp_path / "moved")
  loaded_ids, loaded_scores = index.ScannIndex.load("moved", len(vectors)).search(queries, 2)
  np.testing.assert_array_equal(loaded_ids, ids)
  np.testing.assert_array_equal(loaded_scores, scores)
  with refused(UserError, "relative"):
    index.ScannIndex.load("relative", len(vectors))


def test_blocks_are_searched_as_one(clustered, tmp_path, monkeypatch):
  pytest.importorskip("scann")
  vectors, queries = clustered
  monkeypatch.setattr(index, "EXACT_ROWS", 900)
  # Searches all leaves; with a third of them, some of these few vectors would be missed.
  monkeypatch.setattr(index, "_leaves", lambda n: (10, 10))
  blocks = index.BlockIndex(vectors, "scann", tmp_path, 700)
  assert blocks.blocks == [(0, 700), (700, 1_400), (1_400, 2_000)]
  for block in range(3):
    blocks.build_block(block)
  ids, scores = index.BlockIndex(vectors, "scann", tmp_path, 700).search(queries, 2)
  assert index.recall_at_k(ids, oracle(vectors, queries, 2)) >= 0.99
  np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, ids, 1), atol=1e-5)
  exact = index.BlockIndex(vectors, "exact", "", 10**9)
  assert len(exact.blocks) == 3
  np.testing.assert_array_equal(exact.search(queries, 5)[0], oracle(vectors, queries, 5))
  last = index.BlockIndex(vectors, "exact", "", 10**9, first=500)
  assert last.blocks == [(500, 1_400), (1_400, 2_000)]
  expected = 500 + oracle(vectors[500:], queries, 5)
  np.testing.assert_array_equal(last.search(queries, 5)[0], expected)


def test_merge_in_literals():
  results = [
    (np.array([[4, 7]]), np.array([[0.9, 0.2]])),
    (np.array([[8, -1]]), np.array([[0.5, -np.inf]])),
  ]
  ids, scores = index.merge(results, 3)
  assert ids.tolist() == [[4, 8, 7]]
  assert scores.tolist() == [[0.9, 0.5, 0.2]]
  assert index.merge(results, 4)[0].tolist() == [[4, 8, 7, -1]]


def test_vectors_of_a_large_index_are_in_two_leaves(clustered, tmp_path, monkeypatch):
  pytest.importorskip("scann")
  vectors, queries = clustered
  for large, copies in ((len(vectors) + 1, 1), (len(vectors), 2)):
    monkeypatch.setattr(index, "LARGE", large)
    scann = index.ScannIndex.build(vectors)
    scann.save(tmp_path)
    assert np.load(tmp_path / "datapoint_to_token.npy").size == copies * len(vectors)
    ids, _ = scann.search(queries, 200)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() > 2 for row in ids)


def test_scann_fills_up_when_there_are_too_few(clustered):
  pytest.importorskip("scann")
  vectors, queries = clustered
  ids, scores = index.ScannIndex.build(vectors[:20]).search(queries, 24)
  assert (ids[:, 20:] == -1).all()
  assert np.isneginf(scores[ids == -1]).all()
  assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)
