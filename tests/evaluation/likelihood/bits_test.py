import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.sampling import EvaluationConfig
from cm3leon_jax.data.documents import store as documents
from cm3leon_jax.data.rows import loader
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.evaluation.likelihood.documents import line_of
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.models import transformer
from cm3leon_jax.vocab import VocabLayout
from tests.refusals import refused

VOCAB = VocabLayout(num_special=8, text_size=272, image_size=16)
SIZES = {"num_layers": 2, "width": 16, "num_heads": 2, "mlp_width": 32, "max_positions": 64}
MODEL = ModelConfig(vocab_size=VOCAB.size, dtype="float32", loss_chunk=16, **SIZES)
DATA = DataConfig(sequence_length=64, num_neighbors=2)
CONFIG = EvaluationConfig(num_documents=5, batch_size=8, num_resamples=200)


def pair(key, rng, codes=4, concept=""):
  text = rng.integers(VOCAB.num_special, VOCAB.text_size, rng.integers(1, 6)).astype(np.int32)
  image = VOCAB.image_ids(rng.integers(0, VOCAB.image_size, codes))
  segments = documents.Segment(False, text), documents.Segment(True, image)
  return documents.Document(str(key), segments, "test", "CC0-1.0", "nobody", concept=concept)


@pytest.fixture
def stores(tmp_path):
  rng = np.random.default_rng(0)
  for name, n in (("train", 12), ("heldout", 7)):
    documents.write_documents(tmp_path / name, [pair(i, rng) for i in range(n)], VOCAB)
  return [documents.DocumentStore(tmp_path / name, VOCAB) for name in ("train", "heldout")]


def noisy_params(model):
  def add_noise(x):
    key, sharding = jax.random.key(x.size), jax.typeof(x).sharding
    return x + 0.3 * jax.random.normal(key, x.shape, out_sharding=sharding)

  @jax.jit
  def init(key):
    return jax.tree.map(add_noise, transformer.init_params(model, key))

  return init(jax.random.key(0))


@pytest.fixture(scope="module")
def params():
  with jax.set_mesh(create_mesh(MeshConfig())):
    yield noisy_params(MODEL)


def test_unigram_bits_are_those_of_the_docstring():
  np.testing.assert_allclose(bits.unigram_bits([3, 0, 1]), [0.807, 2.807, 1.807], atol=5e-4)


def test_unigram_table_has_one_distribution_per_modality(stores):
  table = bits.unigram_table(stores[0], VOCAB)
  probability = 2**-table
  assert np.isnan(table[: VOCAB.num_special]).all()
  assert probability[VOCAB.num_special : VOCAB.text_size].sum() == pytest.approx(1)
  assert probability[VOCAB.text_size :].sum() == pytest.approx(1)
  tokens = np.concatenate([stores[0][i].segments[1].tokens for i in range(len(stores[0]))])
  code = int(tokens[0])
  assert probability[code] == pytest.approx(
    (np.sum(tokens == code) + 1) / (len(tokens) + VOCAB.image_size)
  )


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.integers(0, 2**32 - 1))
def test_partners_are_other_documents_of_other_concepts(concepts, seed):
  concepts = np.array([*concepts, 10])  # An interval needs at least two concepts, so this adds one.
  partner = bits.partners(concepts, np.random.default_rng(seed))
  assert sorted(partner) == list(range(len(concepts)))
  assert (partner != np.arange(len(concepts))).all()
  if 2 * np.unique(concepts, return_counts=True)[1].max() <= len(concepts):
    assert (concepts[partner] != concepts).all()


VOCABS = VOCAB, dataclasses.replace(VOCAB, template="chameleon")


@given(st.integers(0, 3), st.sampled_from(VOCABS), st.integers(0, 2**32 - 1))
def test_own_targets_are_exactly_the_documents_tokens(num_neighbors, vocab, seed):
  """Documents have some segments of a pair, twice, in any order."""
  rng = np.random.default_rng(seed)
  made = [pair(i, rng, codes=3) for i in range(num_neighbors + 1)]
  segments = [[x for x in (*d.segments, *d.segments[::-1]) if rng.random() < 0.6] for d in made]
  made = [dataclasses.replace(d, segments=tuple(s)) for d, s in zip(made, segments) if s]
  if not made:
    return
  *neighbors, document = made
  sample = loader.join(made, vocab)
  masks = bits.own_targets(sample, document, vocab)
  line = line_of(document, sample, np.zeros(len(sample) - 1), [], vocab)
  for kind in ("image", "text"):
    expected = [t for s in document.segments if s.is_image == (kind == "image") for t in s.tokens]
    assert sample[1:][masks[kind]].tolist() == expected
  for segment, described in zip(document.segments, line["segments"], strict=True):
    tokens = line["tokens"][described["start"] : described["stop"]]
    assert tokens == segment.tokens.tolist()
  assert bits.fit_neighbors(document, neighbors, len(sample) - 1, vocab) == neighbors
  if neighbors:
    assert bits.fit_neighbors(document, neighbors, len(sample) - 2, vocab) == neighbors[:-1]


def test_neighbors_that_do_not_fit_a_row_are_left_out():
  rng = np.random.default_rng(0)
  document, *neighbors = [pair(i, rng) for i in range(4)]

  def num_positions(kept):
    return len(loader.join([*kept, document], VOCAB)) - 1

  whole, alone = num_positions(neighbors), num_positions([])
  assert bits.fit_neighbors(document, neighbors, whole, VOCAB) == neighbors
  assert bits.fit_neighbors(document, neighbors, whole - 1, VOCAB) == neighbors[:2]
  assert bits.fit_neighbors(document, neighbors, alone, VOCAB) == []
  with refused(UserError, "'0'"):
    bits.fit_neighbors(document, neighbors, alone - 1, VOCAB)


def test_evaluate_differs_between_neighbors_and_repeats_exactly(stores, params):
  ids = np.random.default_rng(3).integers(0, 12, (7, 4)).astype(np.int32)
  ids[2, 1:] = -1

  def run(ids):
    return bits.evaluate(params, MODEL, *stores, ids, VOCAB, DATA, CONFIG, seed=0)

  result = run(ids)
  assert result == run(ids)
  assert result["documents"] == 5
  assert result["mean_neighbors"]["true"] == result["mean_neighbors"]["shuffled"]
  assert result["mean_neighbors"]["none"] == 0
  assert result["image"]["tokens"] == 5 * 4
  for modality in bits.MODALITIES:
    found = result[modality]
    for other in ("shuffled", "none"):
      difference = found[f"true_minus_{other}"]
      assert difference["bits"] == pytest.approx(found["true"]["bits"] - found[other]["bits"])
      assert difference["low"] <= difference["bits"] <= difference["high"]
      assert difference["bits"] != 0
  assert bits.describe(result).endswith("bits per text token, 5 documents of 5 concepts")
  alone = run(np.full_like(ids, -1))
  assert alone["image"]["true"]["bits"] == pytest.approx(alone["image"]["none"]["bits"], rel=1e-5)
  assert alone["image"]["none"]["bits"] == pytest.approx(result["image"]["none"]["bits"], rel=1e-5)


def test_intervals_are_over_the_concepts_of_the_documents(tmp_path, stores, params):
  rng = np.random.default_rng(4)
  # All documents without a concept count as one concept.
  concepts = ["fox"] * 3 + ["cat"] * 2 + [""] * 2
  written = [pair(i, rng, concept=concept) for i, concept in enumerate(concepts)]
  documents.write_documents(tmp_path / "concepts", written, VOCAB)
  store = documents.DocumentStore(tmp_path / "concepts", VOCAB)
  ids, all_documents = rng.integers(0, 12, (7, 2)), dataclasses.replace(CONFIG, num_documents=7)
  result = bits.evaluate(params, MODEL, stores[0], store, ids, VOCAB, DATA, all_documents, seed=0)
  for name in (*bits.CONDITIONS, "true_minus_shuffled", "true_minus_none"):
    found = result["image"][name]
    assert found["groups"] == 4
    assert found["effective_groups"] == pytest.approx(7**2 / (3**2 + 2**2 + 1 + 1))
    assert found["low"] < found["bits"] < found["high"]
  assert bits.describe(result).endswith("7 documents of 4 concepts (effectively 3)")


def test_documents_of_one_concept_are_refused(tmp_path, stores, params):
  rng = np.random.default_rng(5)
  written = [pair(i, rng, concept="fox") for i in range(3)]
  documents.write_documents(tmp_path / "foxes", written, VOCAB)
  foxes = documents.DocumentStore(tmp_path / "foxes", VOCAB)
  ids = np.zeros((3, 2), np.int32)
  with refused(UserError, "two concepts"):
    bits.evaluate(params, MODEL, stores[0], foxes, ids, VOCAB, DATA, CONFIG, seed=0)
