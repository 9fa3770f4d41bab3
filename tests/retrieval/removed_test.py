"""Tests that removed documents are never found, and that searches still find as many documents."""

from concurrent import futures
import dataclasses
import threading
import time

import numpy as np
import pytest

from cm3leon_jax.config.data import RetrievalConfig
from cm3leon_jax.data.documents.store import group_id
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.retrieval import neighbors, removed
from cm3leon_jax.retrieval.bank import Embeddings, copy_bank
from cm3leon_jax.retrieval.neighbors import Retriever
from tests.refusals import refused
from tests.retrieval.neighbors_test import bank_of
from tests.retrieval.stores import write_neighbors

DOCUMENTS, QUERIES, K, GONE = 400, 1_000, 3, 150
# Few candidates, so that without over-fetching many searches would find fewer than K documents.
CONFIG = RetrievalConfig(backend="exact", max_candidates=8, max_similarity=1.0)


@pytest.fixture
def bank(tmp_path):
  """Writes a bank whose document 7 has a copy; returns it with its retriever."""
  made = bank_of(DOCUMENTS)
  made.keys[399] = "k7"
  return made, made.retriever(tmp_path, CONFIG)


def queries_of(bank):
  """Returns queries near the first documents, which will be removed, and random ones."""
  rng = np.random.default_rng(1)
  near = bank.texts[rng.integers(0, GONE, QUERIES // 2)]
  noise = rng.normal(size=(QUERIES, near.shape[1])).astype(np.float32)
  queries = np.concatenate([near + 0.1 * noise[::2], noise[1::2]])
  return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def test_a_thousand_retrievals_never_find_a_removed_document(bank, tmp_path):
  made, before = bank
  queries, gone = queries_of(made), [f"k{i}" for i in range(GONE)]
  usual = before.retrieve(queries, K)[0]
  rows = [*range(GONE), 399]
  assert np.isin(usual, rows).any(1).mean() > 0.5  # Negative control.
  assert removed.remove(tmp_path, gone) == gone
  after = Retriever(tmp_path, CONFIG)
  ids, _ = after.retrieve(queries, K)
  assert ids.shape == (QUERIES, K)
  assert (ids >= 0).all()
  assert not np.isin(ids, rows).any()
  # An exact search of the other documents has the same results.
  vectors = after.bank.documents[:].astype(np.float32)
  vectors[rows] = 0
  best = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")
  np.testing.assert_array_equal(after.search(queries), best[:, : CONFIG.max_candidates])


def test_all_that_is_left_is_found(bank, tmp_path):
  removed.remove(tmp_path, [f"k{i}" for i in range(DOCUMENTS - 1) if i not in (20, 30)])
  ids = Retriever(tmp_path, CONFIG).search(bank[0].texts[:5])
  assert [sorted(row[row >= 0].tolist()) for row in ids] == [[20, 30]] * 5


def test_scann_finds_none_of_them(bank, tmp_path):
  pytest.importorskip("scann")
  made, _ = bank
  scann = dataclasses.replace(CONFIG, backend="scann")
  retriever = Retriever(tmp_path, scann)
  retriever.index.build_block(0)
  queries, rows = queries_of(made), np.arange(GONE)
  assert np.isin(retriever.search(queries), rows).any()
  removed.remove(tmp_path, [f"k{i}" for i in rows if i != 7])
  rows = np.delete(rows, 7)
  ids = Retriever(tmp_path, scann).search(queries)
  assert (ids >= 0).all()
  assert not np.isin(ids, rows).any()


def test_stored_neighbors_move_up(bank, tmp_path):
  ids = np.array([[4, 7, 9, -1], [399, 7, 2, 1]], np.int32)
  write_neighbors(tmp_path / "train_pairs", ids=ids)
  np.testing.assert_array_equal(neighbors.load_neighbors(tmp_path, "train_pairs"), ids)
  removed.remove(tmp_path, ["k7"])
  found = neighbors.load_neighbors(tmp_path, "train_pairs", bank=DOCUMENTS)
  np.testing.assert_array_equal(found, [[4, 9, -1, -1], [2, 1, -1, -1]])


def test_an_unknown_document_is_refused_and_nothing_is_removed(bank, tmp_path, monkeypatch):
  monkeypatch.setattr(removed, "SCAN", 7)
  with refused(UserError, "'nothing'", "bank"):
    removed.remove(tmp_path, ["k3", "nothing", "k7"])
  assert (removed.keys(tmp_path), removed.identity(tmp_path)) == ([], {})
  removed.remove(tmp_path, ["k7"])
  first = removed.identity(tmp_path)
  assert removed.remove(tmp_path, ["k3", "k7"]) == ["k7", "k3"]
  assert removed.identity(tmp_path) != first
  assert removed.rows(tmp_path, ["k1"]).tolist() == [1, 3, 7, 399]


@pytest.mark.parametrize("keys", [["k7"], ["k7 crop 12"], ["k7 crop 3", "k7"]])
def test_crops_of_an_image_are_removed_with_it(keys, tmp_path):
  made = bank_of(DOCUMENTS)
  made.keys = made.keys.astype("U12")
  made.keys[20:32] = [f"k7 crop {i}" for i in range(1, 13)]
  made.keys[9] = "k7 cropped"
  made.retriever(tmp_path, CONFIG)
  assert removed.rows(tmp_path, keys).tolist() == [7, *range(20, 32)]
  assert removed.rows(tmp_path, ["k70"]).tolist() == [70]


def test_a_removed_document_takes_two_hashes(bank, tmp_path, monkeypatch):
  """Regression: it took 1,001, so that 10,000 keys of a bundle took a minute and 1.2 GB."""
  removed.remove(tmp_path, [f"k{i}" for i in range(DOCUMENTS - 1)])
  hashed = []
  monkeypatch.setattr(removed, "group_id", lambda name: hashed.append(name) or group_id(name))
  assert len(removed.rows(tmp_path)) == DOCUMENTS
  assert len({*hashed}) == 2 * (DOCUMENTS - 1)


def test_two_removals_at_once_lose_none(bank, tmp_path, monkeypatch):
  """The second removal waits until the first one, which is slow, has written the file."""
  begun, rows = threading.Event(), removed.rows

  def slow_rows(*args):
    found = rows(*args)
    begun.set()
    time.sleep(0.3)
    return found

  monkeypatch.setattr(removed, "rows", slow_rows)
  with futures.ThreadPoolExecutor() as pool:
    first = pool.submit(removed.remove, tmp_path, ["k1"])
    begun.wait()
    monkeypatch.setattr(removed, "rows", rows)
    assert removed.remove(tmp_path, ["k2"]) == ["k1", "k2"]
    first.result()
  assert removed.keys(tmp_path) == ["k1", "k2"]


def test_removed_documents_of_a_stranger_are_few_and_have_valid_keys(bank, tmp_path):
  write_json(tmp_path / removed.FILE, {"keys": [f"other {i}" for i in range(DOCUMENTS + 1)]})
  with refused(UserError, "removed.json", "401 keys", "400 documents"):
    removed.rows(tmp_path)
  write_json(tmp_path / removed.FILE, {"keys": ["\ud800"]})
  with refused(UserError, r"'\ud800'", "Unicode"):
    removed.rows(tmp_path)


def test_a_copied_bank_has_no_removed_document(bank, tmp_path):
  (tmp_path / "train" / "rows.json").write_text('{"first_bank": 5}')
  removed.remove(tmp_path, ["k7"])
  kept = copy_bank(tmp_path, tmp_path / "copy", train=False)
  assert kept.tolist() == [i - 5 for i in range(5, 399) if i != 7]
  copied, original = (Embeddings(folder / "train") for folder in (tmp_path / "copy", tmp_path))
  np.testing.assert_array_equal(copied.keys[:], original.keys[kept + 5])
