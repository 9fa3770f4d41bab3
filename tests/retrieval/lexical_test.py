import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.config.data import RetrievalConfig
from cm3leon_jax.data.raw import reader
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.retrieval import bank as bank_lib
from cm3leon_jax.retrieval import lexical
from cm3leon_jax.retrieval.bank import Embeddings
from cm3leon_jax.retrieval.lexical import BUCKETS, Lexical
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.stages.shards import Runner
from tests.refusals import refused
from tests.retrieval.bank_test import build, embedded, make_raw, tiny_clip  # noqa: F401

WIDTH, WORDS = 16, 64
PLAIN = RetrievalConfig(backend="exact", max_similarity=1.0)
HYBRID = dataclasses.replace(PLAIN, lexical_weight=0.5, lexical_width=WORDS)
COLORS = ("red", "blue", "green", "black")
OBJECTS = ("bell", "key", "abacus", "star", "drum", "boat")
CAPTIONS = [f"a {color} {thing} at the left" for thing in OBJECTS for color in COLORS]


class BlindCLIP:
  """Fake CLIP model that gives all captions and images the same embedding."""

  resolution = WIDTH

  def encode(self, text):
    return np.arange(len(text), dtype=np.int32)

  def embed_texts(self, texts):
    return np.eye(1, WIDTH, dtype=np.float32).repeat(len(texts), 0)

  def embed_images(self, images):
    return np.eye(1, WIDTH, 1, dtype=np.float32).repeat(len(images), 0)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  root = tmp_path_factory.mktemp("lexical")
  make_raw(root / "raw", CAPTIONS)
  build(root, config=HYBRID)
  return root


def uniform(weight=0.5, width=WORDS):
  """Returns a lexical part in which all words have the same weight."""
  return Lexical(weight, width, np.ones(BUCKETS))


def unit(rows):
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_words_in_literals():
  assert lexical.words("A red bell, a RED key") == ["a", "bell", "key", "red"]
  assert lexical.words("l'été_2026: Straße") == ["2026", "l", "straße", "été"]
  assert lexical.words("") == lexical.words("?! _") == [""]


def test_weights_in_literals():
  weights = lexical.inverse_frequencies(np.array([0, 1, 10]), 10)
  np.testing.assert_allclose(weights, [3.0910, 1.9924, 0.0465], atol=5e-5)


def test_hashes_in_literals():
  assert [lexical.bucket(word) for word in ("bell", "")] == [157709, 7188]
  assert lexical.signs("bell", 10).tolist() == [-1, 1, -1, 1, -1, 1, -1, -1, -1, 1]


@given(st.text(max_size=30), st.sampled_from([1, 7, 64]), st.floats(0.01, 0.99))
def test_all_parts_have_norm_1(text, width, weight):
  rows = unit(np.random.default_rng(0).normal(size=(1, 5)))
  part = uniform(weight, width)
  for joined in (part.embed([text]), part.join(rows, [text]), part.join(rows)):
    np.testing.assert_allclose(np.linalg.norm(joined, axis=1), 1, atol=1e-6)
  np.testing.assert_array_equal(part.join(rows)[0, 5:], 0)


@pytest.mark.parametrize("weight", [0.3, 0.7])
def test_the_cosine_is_the_weighted_mean_of_both(weight):
  texts, documents, images = (unit(np.random.default_rng(i).normal(size=(3, 5))) for i in range(3))
  asked, stored = ["a red bell", "a key", ""], ["a bell", "a blue key", "a star"]
  part = uniform(weight)
  joined = part.join(documents, stored)
  expected = (1 - weight) * texts @ documents.T + weight * part.embed(asked) @ part.embed(stored).T
  np.testing.assert_allclose(part.join(texts, asked) @ joined.T, expected, atol=1e-6)
  np.testing.assert_allclose(
    part.join(images) @ joined.T, np.sqrt(1 - weight) * images @ documents.T, atol=1e-6
  )
  assert Lexical().join(documents, stored) is documents


def test_counts_are_those_of_training_captions(tmp_path):
  captions = ["a red bell", "a key, a KEY", "a bell", "held out"]
  make_raw(tmp_path / "raw", captions, num_shards=2)
  lexical.count_words(str(tmp_path / "raw"), tmp_path, 0.5, 8, Runner())
  stored = read_json(tmp_path / lexical.FILE)
  counts = {"a": 3, "bell": 2, "key": 1, "red": 1}
  assert stored["documents"] == 3
  assert stored["counts"] == {str(lexical.bucket(w)): n for w, n in counts.items()}
  idf = lexical.load(tmp_path, 0.5, 8).idf
  words = ("held", "key", "bell", "a")
  expected = [np.log(8), np.log(1 + 2.5 / 1.5), np.log(1 + 1.5 / 2.5), np.log(1 + 0.5 / 3.5)]
  np.testing.assert_allclose([idf[lexical.bucket(word)] for word in words], expected)


def test_a_bank_of_another_weight_is_refused(built):
  for changed in ({"lexical_weight": 0.0}, {"lexical_weight": 0.3}, {"lexical_width": 32}):
    with refused(UserError, lexical.FILE):
      Retriever(built / "out", dataclasses.replace(HYBRID, **changed))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_are_those_of_the_pairs(built, split):
  pairs, rows = reader.read_pairs(built / "raw", split), Embeddings(built / "out" / split)
  clip, part = tiny_clip(), lexical.load(built / "out", 0.5, WORDS)
  captions = [p.caption for p in pairs]
  texts = clip.embed_texts([clip.encode(caption) for caption in captions])
  images = clip.embed_images(reader.load_images([p.image for p in pairs], 16, 1))
  documents = bank_lib.document_embeddings(texts, images)
  np.testing.assert_allclose(rows.documents[:], part.join(documents, captions), atol=1e-3)
  np.testing.assert_allclose(rows.images[:], part.join(images), atol=1e-3)
  share = 0.2 * (split == "train")
  asked = [bank_lib.drop_words(p.caption, share, p.key, 0) for p in pairs]
  assert (asked != captions) == (split == "train")
  queries = part.join(clip.embed_texts([clip.encode(caption) for caption in asked]), asked)
  np.testing.assert_allclose(rows.queries[:], queries, atol=1e-3)
  assert rows.documents.shape == (len(pairs), WIDTH + WORDS)


def test_a_rare_word_decides_where_clip_is_blind(tmp_path):
  captions = [*CAPTIONS[:20], "a white zeppelin at the right"]
  make_raw(tmp_path / "raw", captions)
  pairs, found = None, {}
  query = "a red zeppelin at the left"
  for config in (HYBRID, PLAIN):
    build(tmp_path, f"{config.lexical_weight}", config, BlindCLIP)
    retriever = Retriever(tmp_path / f"{config.lexical_weight}", config)
    pairs = reader.read_pairs(tmp_path / "raw", "train")
    vector = retriever.lexical.join(BlindCLIP().embed_texts([query]), [query])
    ids = retriever.search(vector)[0]
    found[config] = [pairs[i].caption for i in ids if i >= 0]
  assert found[HYBRID][0] == "a white zeppelin at the right"
  assert found[HYBRID][1].startswith("a red")
  # Negative control: without a lexical part, neighbors are in the order of the bank.
  assert found[PLAIN] == [p.caption for p in pairs]


def test_finished_work_is_kept_and_another_weight_embeds_again(tmp_path, embedded):  # noqa: F811
  make_raw(tmp_path / "raw", CAPTIONS)
  sizes = []
  for config in (HYBRID, HYBRID, PLAIN):
    build(tmp_path, config=config)
    sizes.append(len(embedded))
  n = len(CAPTIONS)
  assert sizes == [n, n, 2 * n]
  assert not (tmp_path / "out" / lexical.FILE).exists()


@given(st.text(max_size=40), st.text(max_size=5), st.floats(0, 0.99))
def test_dropped_words_are_a_function_of_the_document(text, key, share):
  kept = bank_lib.drop_words(text, share, key, 0)
  assert kept == bank_lib.drop_words(text, share, key, 0)
  assert set(kept.split()) <= set(text.split())
  assert bool(kept.split()) == bool(text.split())
