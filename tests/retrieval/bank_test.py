import dataclasses
import functools
import shutil

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config.data import RetrievalConfig
from cm3leon_jax.config.tokenizers import CLIPConfig
from cm3leon_jax.data.documents.store import group_id
from cm3leon_jax.data.raw import reader
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.retrieval import bank as bank_lib
from cm3leon_jax.retrieval import index, neighbors
from cm3leon_jax.retrieval.bank import Embeddings, EmbedJob
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.stages import stages
from cm3leon_jax.stages import table as stage_table
from cm3leon_jax.stages.shards import Runner
from tests.data.raw_folder import write_raw
from tests.models.tiny import random_arrays
from tests.refusals import refused

CONFIG = RetrievalConfig(backend="exact", max_similarity=1.0)
WIDTH = 16


@functools.cache
def tiny_clip():
  config = CLIPConfig(
    resolution=16, image_encoder="conv", patch=4, image_width=64, image_layers=1,
    text_width=64, text_layers=1, text_length=6, embed_dim=16,
  )  # fmt: skip
  types = jax.eval_shape(lambda: clip_lib.init_params(config, 50, jax.random.key(0)))
  return CLIP(config, 50, random_arrays(types), encode)


def encode(text):
  return np.array([ord(c) % 40 + 5 for c in text], np.int32)


CAPTIONS = [chr(97 + i) * 3 for i in range(24)]


def make_raw(folder, captions=CAPTIONS, num_shards=3, first="train"):
  """Writes pairs with random images. Of every four, one has split `first`, one is held out."""
  images = np.random.default_rng(0).integers(0, 256, (len(captions), 16, 16, 3), np.uint8)
  splits = [first, "train", "train", "heldout"]
  pairs = [
    {"key": f"k{i}", "caption": caption, "group": f"g{i // 2}", "split": splits[i % 4]}
    for i, caption in enumerate(captions)
  ]
  write_raw(folder, pairs, images, num_shards)


def build(root, out="out", config=CONFIG, clip=tiny_clip, dropout=0.2):
  job = EmbedJob(str(root / "raw"), str(root / out), clip, dropout, 0, {})
  return neighbors.build_neighbors(config, job, WIDTH, {"clip": "tiny"}, Runner())


@pytest.fixture
def embedded(monkeypatch):
  """Returns a list of the keys of all pairs that are embedded."""
  keys, embed_pairs = [], bank_lib.embed_pairs

  def listed(clip, pairs, *args):
    keys.extend(pair.key for pair in pairs)
    return embed_pairs(clip, pairs, *args)

  monkeypatch.setattr(bank_lib, "embed_pairs", listed)
  return keys


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """Returns a folder with raw/ and out/, and the summary of the stage."""
  root = tmp_path_factory.mktemp("bank")
  make_raw(root / "raw")
  return root, build(root)


def test_rows_are_those_of_the_pairs(built):
  root, _ = built
  clip = tiny_clip()
  for split in ("train", "heldout"):
    pairs, rows = reader.read_pairs(root / "raw", split), Embeddings(root / "out" / split)
    assert len(rows) == len(pairs) == {"train": 18, "heldout": 6}[split]
    texts = clip.embed_texts([clip.encode(p.caption) for p in pairs])
    images = clip.embed_images(reader.load_images([p.image for p in pairs], 16, 1))
    np.testing.assert_allclose(rows.images[:], images, atol=1e-3)
    np.testing.assert_allclose(
      rows.documents[:], bank_lib.document_embeddings(texts, images), atol=1e-3
    )
    dropped = [
      bank_lib.drop_tokens(clip.encode(p.caption), 0.2 * (split == "train"), p.key, 0)
      for p in pairs
    ]
    np.testing.assert_allclose(rows.queries[:], clip.embed_texts(dropped), atol=1e-3)
    assert (np.abs(rows.queries[:] - texts).max() > 1e-2) == (split == "train")
    assert rows.keys[:].tolist() == [group_id(p.key) for p in pairs]
    assert rows.groups[:].tolist() == [group_id(p.group) for p in pairs]
    assert rows.documents.dtype == np.float16


def test_documents_of_the_bank_are_found_and_search_for_nothing(tmp_path):
  make_raw(tmp_path / "raw", first="bank")
  summary = build(tmp_path)
  assert summary["bank"] == 18
  keys = [group_id(p.key) for p in reader.read_pairs(tmp_path / "raw", "train")]
  alone = [group_id(p.key) for p in reader.read_pairs(tmp_path / "raw", "bank")]
  rows = Embeddings(tmp_path / "out" / "train")
  assert rows.keys[:].tolist() == keys + alone
  assert (len(keys), len(alone)) == (12, 6)
  for split, count in (("train", 12), ("heldout", 6)):
    ids = neighbors.load_neighbors(tmp_path / "out", f"{split}_pairs")
    assert len(ids) == count
    assert (ids >= 12).any()
    assert ((ids >= 0) & (ids < 12)).any()
  config = dataclasses.replace(CONFIG, train_documents=False)
  assert build(tmp_path, "alone", config)["bank"] == 6
  for split, count in (("train", 12), ("heldout", 6)):
    ids = neighbors.load_neighbors(tmp_path / "alone", f"{split}_pairs")
    assert len(ids) == count
    assert set(ids[ids >= 0].tolist()) == set(range(12, 18))


def test_the_stage_writes_neighbors_of_both_splits(built):
  root, summary = built
  assert summary["recall@2"] == 1
  assert (summary["bank"], summary["backend"]) == (18, "exact")
  ids, scores = (
    neighbors.load_neighbors(root / "out", "train_pairs", array=array)
    for array in ("ids", "scores")
  )
  assert ids.shape == scores.shape == (18, 4)
  assert summary["train_mean_kept"] == (ids >= 0).sum(1).mean()
  np.testing.assert_allclose(summary["train_mean_similarity"], scores[ids >= 0].mean(), rtol=1e-5)
  assert summary["train_rejected_own_group"] > 0
  assert neighbors.load_neighbors(root / "out", "heldout_pairs").shape == (6, 4)
  by_caption = neighbors.load_neighbors(root / "out", "heldout_pairs", text_only=True)
  query = tiny_clip().embed_texts([tiny_clip().encode("ddd")])  # The first held-out caption.
  np.testing.assert_array_equal(
    Retriever(root / "out", CONFIG).retrieve(query)[0][0], by_caption[0]
  )


def files_of(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("c/*")) if p.is_file()
  }


def test_blocks_and_shards_do_not_matter(built, tmp_path, monkeypatch):
  root, _ = built
  monkeypatch.setattr(neighbors, "QUERY_SHARE", 2)
  make_raw(tmp_path / "raw", num_shards=1)
  build(tmp_path, config=dataclasses.replace(CONFIG, index_rows=7))
  for split in ("train", "heldout"):
    for name in ("ids", "scores"):
      one, many = (
        bank_lib.ArrayStore(r / "out" / f"{split}_pairs" / name)[:] for r in (root, tmp_path)
      )
      np.testing.assert_allclose(one, many, atol=1e-6)


def test_new_shards_are_appended(tmp_path, embedded):
  make_raw(tmp_path / "all", num_shards=4)
  make_raw(tmp_path / "raw", num_shards=4)
  path = tmp_path / "raw" / reader.INDEX
  whole = read_json(path)
  write_json(path, {**whole, "shards": {k: v for k, v in whole["shards"].items() if k != "000003"}})
  build(tmp_path)
  before = Embeddings(tmp_path / "out" / "train").documents[:]
  embedded.clear()
  write_json(path, whole)
  assert build(tmp_path)["bank"] == 18
  assert embedded == ["k18", "k20", "k21", "k22", "k19", "k23"]
  np.testing.assert_array_equal(
    Embeddings(tmp_path / "out" / "train").documents[: len(before)], before
  )
  build(tmp_path, "anew")
  assert files_of(tmp_path / "out") == files_of(tmp_path / "anew")


def test_scann_is_built_once_and_saved(tmp_path, monkeypatch):
  pytest.importorskip("scann")
  make_raw(tmp_path / "raw")
  config = dataclasses.replace(CONFIG, backend="scann")
  summary = build(tmp_path, config=config)
  assert summary["backend"] == "scann"
  ids = neighbors.load_neighbors(tmp_path / "out", "train_pairs")
  monkeypatch.setattr(index.ScannIndex, "build", None)  # Building another index would call None.
  assert build(tmp_path, config=config)["train_mean_kept"] == summary["train_mean_kept"]
  np.testing.assert_array_equal(neighbors.load_neighbors(tmp_path / "out", "train_pairs"), ids)


def test_a_damaged_index_is_refused_and_built_again_without_another_id(tmp_path):
  pytest.importorskip("scann")
  make_raw(tmp_path / "raw")
  config, out = dataclasses.replace(CONFIG, backend="scann"), tmp_path / "neighbors"
  table = stage_table.STAGES["neighbors"]

  def finish():
    with stages.once(out, {}, files=table.files, varying=table.varying):
      build(tmp_path, "neighbors", config)
    return stages.require(tmp_path, "neighbors")["id"]

  before, queries = finish(), np.ones((1, WIDTH), np.float32) / 4
  Retriever(out, config).search(queries)
  codebook = out / "index" / "000000" / "ah_codebook.pb"
  codebook.write_bytes(b"0" * len(codebook.read_bytes()))
  with refused(UserError, "000000"):
    Retriever(out, config).search(queries)
  shutil.rmtree(out / "index" / "000000")
  (out / stages.DONE).unlink()
  assert finish() == before
  Retriever(out, config).search(queries)


@settings(max_examples=50, deadline=None)
@given(
  st.lists(st.integers(5, 99), min_size=1, max_size=30), st.text(max_size=5), st.floats(0, 0.99)
)
def test_query_dropout_is_a_function_of_the_document(ids, key, share):
  ids = np.array(ids, np.int32)
  kept = bank_lib.drop_tokens(ids, share, key, 0)
  np.testing.assert_array_equal(kept, bank_lib.drop_tokens(ids, share, key, 0))
  assert len(kept) >= 1
  assert set(kept) <= set(ids)


def test_query_dropout_drops_its_share():
  ids = np.arange(10_000)
  kept = bank_lib.drop_tokens(ids, 0.2, "a", 0)
  assert abs(len(kept) / len(ids) - 0.8) < 0.02
  assert (np.diff(kept) > 0).all()
  assert not np.array_equal(kept, bank_lib.drop_tokens(ids, 0.2, "b", 0))
  assert not np.array_equal(kept, bank_lib.drop_tokens(ids, 0.2, "a", 1))
  np.testing.assert_array_equal(bank_lib.drop_tokens(ids, 0.0, "a", 0), ids)
