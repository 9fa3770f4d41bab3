import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import stages
from cm3leon_jax.config import UserError
from cm3leon_jax.retrieval import clip as clip_lib
from cm3leon_jax.retrieval import neighbors
from cm3leon_jax.retrieval.clip import CLIP, CLIPConfig
from cm3leon_jax.retrieval.neighbors import Bank, RetrievalConfig, Retriever, select_neighbors

EXACT = RetrievalConfig(backend="exact")
NOBODY = lambda candidate: False


def at_angles(*degrees):
  """Unit vectors in the plane: the cosine of two is that of their angles' difference; 0.9 is 25.8 degrees."""
  radians = np.deg2rad(degrees)
  return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


VECTORS = at_angles(10, 40, 50, 80, 85, 110, 140)  # documents 0 to 6; the query lies at 0


def select(sides, forbidden=NOBODY, kept=2, limit=0.9):
  ids, rejected = select_neighbors([np.array(s) for s in sides], VECTORS, at_angles(0)[0], forbidden, kept, limit)
  return ids, dict(rejected)


def test_sides_alternate_best_first():
  assert select([[1, 3, 5], [6, 5]]) == ([1, 6, 3, 5], {})


def test_similar_to_the_query_is_skipped():
  assert select([[0, 1, 3], [5, 6]]) == ([1, 5, 3, 6], {"similar_to_query": 1})
  assert select([[0, 1], [5, 6]], limit=0.99)[0] == [0, 5, 1, 6]  # negative control


def test_similar_to_a_kept_one_is_skipped():
  assert select([[1, 2, 3], [4, 6]]) == ([1, 4, 6], {"similar_to_kept": 2})
  assert select([[1, 2, 3], [4, 6]], limit=0.997)[0] == [1, 4, 2, 6]  # negative control


def test_found_by_both_sides_is_kept_once():
  assert select([[3, 1], [3, 5]], kept=1, limit=1.0) == ([3, 5], {"similar_to_kept": 1})


def test_own_group_is_skipped():
  assert select([[1, 3], [5, 1]], lambda c: c in (1, 5)) == ([3], {"own_group": 3})


def test_empty_places_of_a_list_are_skipped():
  assert select([[-1, -1], [5, -1]]) == ([5], {})


def bank_of(n, seed=0, size=8):
  rng = np.random.default_rng(seed)
  texts, images = (np.asarray(clip_lib.normalize(rng.normal(size=(n, size)).astype(np.float32))) for _ in range(2))
  return Bank(texts, images, np.array([f"g{i // 2}" for i in range(n)]), np.array([f"k{i}" for i in range(n)]))


def neighbors_of(bank, config=EXACT):
  retriever = Retriever(bank, config)
  sides = [retriever.search(bank.texts)[0], retriever.search(bank.images)[0]]
  return retriever.select(sides, bank.documents, bank.keys, bank.groups, config.kept_per_side)


def test_the_rules_hold_on_a_bank():
  bank = bank_of(40)
  ids, scores, rejected = neighbors_of(bank)
  assert ids.shape == scores.shape == (40, 4)
  assert (ids.dtype, scores.dtype) == (np.int32, np.float32)
  assert rejected["own_group"] > 0
  vectors = bank.documents
  for i, row in enumerate(ids):
    kept = row[row >= 0]
    assert (row[len(kept) :] == -1).all()
    assert not (bank.groups[kept] == bank.groups[i]).any()
    assert (vectors[kept] @ vectors[i] <= 0.9).all()
    assert (np.triu(vectors[kept] @ vectors[kept].T, 1) <= 0.9).all()
    np.testing.assert_allclose(scores[i, : len(kept)], vectors[kept] @ vectors[i], atol=1e-6)


def test_without_groups_only_itself_is_excluded():
  bank = dataclasses.replace(bank_of(30), groups=np.full(30, ""))
  ids, _, rejected = neighbors_of(bank)
  assert (ids != np.arange(30)[:, None]).all()
  assert rejected["own_group"] > 0


def test_two_documents_of_one_group_have_no_neighbours():
  ids, scores, _ = neighbors_of(bank_of(2))
  assert (ids == -1).all()
  assert (scores == 0).all()


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(24)))
def test_the_order_of_the_bank_does_not_matter(order):
  bank, order = bank_of(24), np.array(order)
  shuffled = Bank(bank.texts[order], bank.images[order], bank.groups[order], bank.keys[order])
  names = lambda bank, ids: np.where(ids >= 0, bank.keys[ids], "")
  expected = names(bank, neighbors_of(bank)[0])
  np.testing.assert_array_equal(names(shuffled, neighbors_of(shuffled)[0]), expected[order])


def test_retrieval_by_caption_is_best_first():
  bank = bank_of(30)
  retriever = Retriever(bank, EXACT)
  ids, scores = retriever.retrieve(bank.texts[:5])
  assert ids.shape == (5, 4)
  assert (np.diff(scores, axis=1) <= 0).all()
  np.testing.assert_allclose(scores, (bank.texts[:5, None] * bank.documents[ids]).sum(-1), atol=1e-6)
  assert (ids[0] != retriever.retrieve(bank.texts[5:6])[0][0]).any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(5, 99), min_size=1, max_size=30), st.text(max_size=5), st.floats(0, 0.99))
def test_query_dropout_is_a_function_of_the_document(ids, key, share):
  ids = np.array(ids, np.int32)
  kept = neighbors.drop_tokens(ids, share, key, 0)
  np.testing.assert_array_equal(kept, neighbors.drop_tokens(ids, share, key, 0))
  assert len(kept) >= 1
  assert set(kept) <= set(ids)


def test_query_dropout_drops_its_share():
  ids = np.arange(10_000)
  kept = neighbors.drop_tokens(ids, 0.2, "a", 0)
  assert abs(len(kept) / len(ids) - 0.8) < 0.02
  assert (np.diff(kept) > 0).all()
  assert not np.array_equal(kept, neighbors.drop_tokens(ids, 0.2, "b", 0))
  assert not np.array_equal(kept, neighbors.drop_tokens(ids, 0.2, "a", 1))
  np.testing.assert_array_equal(neighbors.drop_tokens(ids, 0.0, "a", 0), ids)


def test_document_embedding_in_literals():
  both = neighbors.document_embeddings(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))
  np.testing.assert_allclose(both, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_bank_survives_the_disk(tmp_path):
  bank = bank_of(5)
  bank.save(tmp_path / "bank.npz")
  loaded = Bank.load(tmp_path / "bank.npz")
  for field in dataclasses.fields(Bank):
    np.testing.assert_array_equal(getattr(loaded, field.name), getattr(bank, field.name))
  with pytest.raises(UserError, match=r"none\.npz does not exist"):
    Bank.load(tmp_path / "none.npz")


def tiny_clip():
  config = CLIPConfig(
    resolution=16, image_encoder="conv", patch=4, image_width=64, image_layers=1, text_width=64, text_layers=1, text_length=6,
    embed_dim=16,
  )  # fmt: skip
  encode = lambda text: np.array([ord(c) % 40 + 5 for c in text], np.int32)
  return CLIP(config, 50, clip_lib.init_params(config, 50, jax.random.key(0)), encode)


def write_raw(folder, n=24):
  (folder / "images").mkdir(parents=True)
  lines = []
  for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), np.uint8)):
    Image.fromarray(image).save(folder / f"images/{i}.png")
    about = {"source": "", "license": "", "attribution": "", "group": "", "concept": f"c{i}"}
    about["split"] = "heldout" if i % 4 == 3 else "train"
    lines.append({"key": f"k{i}", "image": f"images/{i}.png", "caption": chr(97 + i) * 3, **about})
  (folder / "pairs.jsonl").write_text("\n".join(map(stages.json.dumps, lines)) + "\n")


def test_the_stage_writes_bank_and_neighbours(tmp_path):
  write_raw(tmp_path / "raw")
  config = dataclasses.replace(EXACT, max_similarity=1.0)
  summary = neighbors.build_neighbors(config, tiny_clip(), tmp_path / "raw", tmp_path / "out", 0)
  assert summary["recall@2"] == summary["train_all_kept"] == 1
  ids, scores = neighbors.load_neighbors(tmp_path / "out", "train_pairs")
  assert ids.shape == scores.shape == (18, 4)
  assert neighbors.load_neighbors(tmp_path / "out", "heldout_pairs")[0].shape == (6, 4)
  by_caption = neighbors.load_neighbors(tmp_path / "out", "heldout_pairs", text_only=True)
  retriever = Retriever(Bank.load(tmp_path / "out" / neighbors.BANK), config)
  query = tiny_clip().embed_texts([tiny_clip().encode("ddd")])  # the first held-out caption
  np.testing.assert_array_equal(retriever.retrieve(query)[0][0], by_caption[0][0])
  with pytest.raises(UserError, match="only held-out pairs"):
    neighbors.load_neighbors(tmp_path / "out", "train_pairs", text_only=True)


@pytest.mark.parametrize(
  ("field", "value"),
  [("backend", "faiss"), ("kept_per_side", 0), ("max_candidates", 1), ("max_similarity", 2.0), ("query_dropout", 1.0)],
)
def test_config_names_the_field(field, value):
  with pytest.raises(ValueError, match=field):
    RetrievalConfig(**{field: value})
