from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from benchmarks import retrieval_ablation
from benchmarks.retrieval_ablation import Corpus
from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Document, DocumentStore, Segment, write_documents
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.neighbors import load_neighbors
from cm3leon_jax.runs import stages
from cm3leon_jax.vocab import VocabLayout
from tests.messages import refused

VOCAB = VocabLayout(num_special=8, text_size=272, image_size=16)
TRAIN, HELDOUT = (
  np.repeat(np.arange(12), 2),
  np.array([3, 3, 7, 12, 13, 13]),
)  # Concepts; 12 and 13 are not in train.


def write_neighbors(folder, rng):
  """Writes candidates of 24 train and 6 held-out documents; the first has their concept."""
  for name, own in (("train_pairs", TRAIN), ("heldout_pairs", HELDOUT)):
    ids = rng.integers(0, len(TRAIN), (len(own), 4)).astype(np.int32)
    ids[:, 0] = 2 * (own % 12)
    ids[::3, 3] = -1
    for prefix in ("", "text_") if name == "heldout_pairs" else ("",):
      for array, values in (("ids", ids), ("scores", rng.random((len(own), 4)).astype(np.float32))):
        ArrayStore.create(folder / name / f"{prefix}{array}", (4,), values.dtype).append(values)
  with stages.once(folder, {"seed": 0}):
    pass


@pytest.fixture
def corpus():
  return Corpus(None, None, TRAIN, HELDOUT)


def test_a_held_out_document_is_drawn_by_others_or_new(corpus):
  np.testing.assert_array_equal(
    corpus.subsets["drawn_by_others"], [True, True, True, False, False, False]
  )
  np.testing.assert_array_equal(corpus.subsets["new"], ~corpus.subsets["drawn_by_others"])


@given(st.integers(0, 2**32 - 1), st.integers(20, 60))
def test_shuffling_gives_every_document_the_candidates_of_another_and_never_its_concept(seed, n):
  rng = np.random.default_rng(seed)
  own = rng.integers(0, 10, n)
  candidates = rng.integers(-1, 10, (n, 2))
  candidates[:, 0] = own
  order = retrieval_ablation.shuffled_order(own, candidates, rng)
  np.testing.assert_array_equal(np.sort(order), np.arange(n))
  assert not (order == np.arange(n)).any()
  assert not (candidates[order] == own[:, None]).any()


def test_an_impossible_shuffle_is_an_error():
  with refused(UserError):
    retrieval_ablation.shuffled_order(
      np.zeros(3, int), np.zeros((3, 1), int), np.random.default_rng(0)
    )


def test_the_control_has_the_same_neighbors_of_other_documents(tmp_path, corpus):
  write_neighbors(tmp_path / "true", np.random.default_rng(1))
  retrieval_ablation.shuffle_neighbors(tmp_path / "true", tmp_path / "shuffled", corpus, seed=0)
  for name, text_only in (
    ("train_pairs", False),
    ("heldout_pairs", False),
    ("heldout_pairs", True),
  ):
    (ids, scores), (shuffled_ids, shuffled_scores) = (
      [load_neighbors(tmp_path / folder, name, text_only, array) for array in ("ids", "scores")]
      for folder in ("true", "shuffled")
    )
    rows = np.concatenate([ids, scores], axis=1).tolist()
    assert sorted(rows) == sorted(np.concatenate([shuffled_ids, shuffled_scores], axis=1).tolist())
    assert not (scores == shuffled_scores).all(1).any()
  true, shuffled = (
    retrieval_ablation.own_concept_share(tmp_path / name, corpus) for name in ("true", "shuffled")
  )
  assert true["heldout_first"] == 1
  assert true["train_candidates"] > 0.25
  assert set(shuffled.values()) == {0}


def test_the_control_is_another_stage_than_the_true_neighbors_for_every_seed(tmp_path, corpus):
  write_neighbors(tmp_path / "true", np.random.default_rng(1))
  ids, first = [read_json(tmp_path / "true" / stages.DONE)["id"]], []
  for seed in (0, 1):
    retrieval_ablation.shuffle_neighbors(tmp_path / "true", tmp_path / f"{seed}", corpus, seed)
    ids.append(read_json(tmp_path / f"{seed}" / stages.DONE)["id"])
    first.append(load_neighbors(tmp_path / f"{seed}", "train_pairs"))
  assert len(set(ids)) == 3
  assert (first[0] != first[1]).any()


def test_concepts_of_both_stores_are_numbered_alike(tmp_path):
  segments = (Segment(False, np.array([9], np.int32)), Segment(True, VOCAB.image_ids(np.arange(4))))
  for split, concepts in (("train", ("fox", "apple")), ("heldout", ("fox", "pear"))):
    documents = [Document(c, segments, "s", "l", "a", concept=c) for c in concepts]
    write_documents(tmp_path / "documents" / f"{split}_pairs", documents, VOCAB)
  corpus = retrieval_ablation.open_corpus(tmp_path, VOCAB)
  assert isinstance(corpus.train, DocumentStore)
  fox, apple = corpus.train_concepts
  assert corpus.heldout_concepts[0] == fox != apple
  assert corpus.heldout_concepts[1] == 3 - fox - apple  # Numbers 0, 1 and 2.


def test_every_condition_has_checked_settings_of_equal_rows(tmp_path):
  ablation = retrieval_ablation.Ablation(tmp_path, steps=30, minutes=20)
  for condition in retrieval_ablation.CONDITIONS.values():
    overrides = ablation.overrides(**{"data.num_neighbors": condition.num_neighbors, "seed": 2})
    settings = ablation.settings(overrides)
    assert (settings.seed, settings.train.steps) == (2, 30)
    assert settings.data.num_neighbors == condition.num_neighbors
    sample, row = (
      (1 + condition.num_neighbors) * (settings.vqgan.image_tokens + 10),
      settings.data.sequence_length,
    )
    assert row // sample * sample > 0.93 * row


def test_the_control_is_made_once_and_anew_only_for_new_neighbors(tmp_path, corpus):
  def shuffled():
    retrieval_ablation.shuffle_neighbors(tmp_path / "true", tmp_path / "shuffled", corpus, seed=0)
    return load_neighbors(tmp_path / "shuffled", "train_pairs")

  write_neighbors(tmp_path / "true", np.random.default_rng(1))
  first, written = shuffled(), (tmp_path / "shuffled" / stages.DONE).stat().st_mtime_ns
  np.testing.assert_array_equal(shuffled(), first)
  assert (tmp_path / "shuffled" / stages.DONE).stat().st_mtime_ns == written
  (tmp_path / "true" / stages.DONE).unlink()
  write_neighbors(tmp_path / "true", np.random.default_rng(2))
  assert (shuffled() != first).any()
