"""From captions to files: which captions and neighbours, and that every record says how its picture was made."""

import dataclasses

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents import DocumentStore, Segment, group_id, write_documents
from cm3leon_jax.decoding import draw
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.retrieval import clip as clip_lib
from cm3leon_jax.retrieval import neighbors
from cm3leon_jax.retrieval.bank import Embeddings
from cm3leon_jax.settings import default_config, settings_from_config
from cm3leon_jax.tokenizers import text, vqgan
from tests.data.raw import write_raw
from tests.data.stores import VOCAB, make_sources
from tests.models.tiny import random_params
from tests.retrieval.stores import write_bank, write_neighbors

CAPTIONS = ["red apple", "green apple", "blue car", "old house", "new house"]
CLIP_CONFIG = {"resolution": 8, "patch": 4, "image_width": 64, "image_layers": 1, "text_width": 64, "text_layers": 1}


def make_settings():
  config = default_config()
  config.vocab.update(dataclasses.asdict(VOCAB))
  config.vqgan.update({"resolution": 8, "downsample": 2, "stem": 2, "width": 8, "multipliers": (1,)})
  config.vqgan.update({"encoder_blocks": (0,), "decoder_blocks": (0,), "code_dim": 4, "adversarial_weight": 0.0})
  config.clip.update({**CLIP_CONFIG, "text_length": 8, "embed_dim": 16})
  config.retrieval.update({"backend": "exact"})
  config.data.update({"sequence_length": 128})
  config.model.update({"vocab_size": VOCAB.size, "num_layers": 1, "width": 32, "num_heads": 8, "mlp_width": 32})
  config.model.update({"max_positions": 128, "dtype": "float32"})
  config.sampling.update({"top_k": 8})
  config.train.update({"num_samples": 3})
  return settings_from_config(config)


SETTINGS = make_settings()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """What the stages before drawing leave, with random weights."""
  root = epath.Path(tmp_path_factory.mktemp("draw"))
  words = [" ".join(CAPTIONS[i % 5].split() + [f"word{i}"]) for i in range(200)] * 3  # Enough for 512 ids.
  text.train_text_tokenizer(words, VOCAB, text.TextTokenizerConfig(), root / "text_tokenizer")
  encode = text.TextTokenizer(root / "text_tokenizer", VOCAB).encode
  about = {"split": "heldout", "source": "test", "license": "CC0-1.0", "attribution": "nobody"}
  pairs = [{"key": f"h{i}", "caption": caption, **about} for i, caption in enumerate(CAPTIONS)]
  write_raw(root / "raw", pairs, [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(len(pairs))])
  bank = make_sources(root / "made", num_pairs=12)[0].store
  write_documents(root / "documents" / "train_pairs", [bank[i] for i in range(12)], VOCAB)
  make = lambda i, caption: dataclasses.replace(
    bank[i], key=f"h{i}", segments=(Segment(False, encode(caption)), bank[i].segments[1])
  )
  write_documents(root / "documents" / "heldout_pairs", [make(i, c) for i, c in enumerate(CAPTIONS)], VOCAB)
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(2, 12, 16)).astype(np.float32)
  texts, images = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
  keys = np.array([bank[i].key for i in range(12)])
  write_bank(root / "neighbors" / "train", texts, images, keys, keys)
  ids = np.stack([rng.permutation(12)[:4] for _ in CAPTIONS]).astype(np.int32)
  ids[1, 1:] = -1
  write_neighbors(root / "neighbors" / "heldout_pairs", text_ids=ids)
  image_params = vqgan.init_params(SETTINGS.vqgan, VOCAB.image_size, jax.random.key(0))
  vqgan.ImageTokenizer(SETTINGS.vqgan, VOCAB.image_size, image_params).save(root / "vqgan")
  return root


@pytest.fixture(scope="module")
def clip(workdir):
  params = clip_lib.init_params(SETTINGS.clip, VOCAB.text_size, jax.random.key(0))
  return clip_lib.CLIP(SETTINGS.clip, VOCAB.text_size, params, text.TextTokenizer(workdir / "text_tokenizer", VOCAB).encode)


def test_heldout_prompts_are_spread_and_know_their_neighbours(workdir):
  prompts = draw.heldout_prompts(SETTINGS, workdir, 3, seed=7, retrieve=2)
  assert [p.text for p in prompts] == ["red apple", "blue car", "new house"]
  assert [p.seed for p in prompts] == [7, 8, 9]
  assert [p.key for p in prompts] == ["h0", "h2", "h4"]
  ids = neighbors.load_neighbors(workdir / "neighbors", "heldout_pairs", text_only=True)
  bank = DocumentStore(workdir / "documents" / "train_pairs", VOCAB)
  assert [[d.key for d in p.neighbors] for p in prompts] == [[bank[int(i)].key for i in ids[row][:2]] for row in (0, 2, 4)]
  every = draw.heldout_prompts(SETTINGS, workdir, 5, seed=7, retrieve=2)
  assert len(every[1].neighbors) == 1  # It has no second one.
  with pytest.raises(UserError, match="--captions is 6; only 5 pairs are held out"):
    draw.heldout_prompts(SETTINGS, workdir, 6, seed=0, retrieve=0)


def test_free_prompts_find_the_neighbours_that_clip_names(workdir, clip):
  (prompt,) = draw.free_prompts(SETTINGS, workdir, ["green car"], 3, 2, clip, workdir)
  bank = Embeddings(workdir / "neighbors" / "train")
  scores = bank.documents[:] @ clip.embed_texts([prompt.ids])[0]
  assert bank.keys[:][np.argmax(scores)] == group_id(prompt.neighbors[0].key)
  assert (prompt.seed, prompt.original, len(prompt.neighbors)) == (3, None, 2)
  assert draw.free_prompts(SETTINGS, workdir, ["green car"], 3, 0, clip, workdir)[0].neighbors == ()
  with pytest.raises(UserError, match="--prompt is empty"):
    draw.free_prompts(SETTINGS, workdir, ["car", " "], 0, 0, clip, workdir)


def test_every_picture_has_a_file_and_a_record(workdir, clip, tmp_path):
  folder = epath.Path(tmp_path) / "samples"
  prompts = draw.heldout_prompts(SETTINGS, workdir, 2, seed=5, retrieve=2)
  with jax.set_mesh(create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
    records = draw.draw_all(SETTINGS, workdir, folder, random_params(SETTINGS.model), prompts, clip, [1.0, 3.0], [0, 2])
  settings = [(r["prompt"], r["guidance"], r["retrieve"]) for r in records]
  assert settings == [(p.text, g, k) for k in (0, 2) for g in (1.0, 3.0) for p in prompts]
  tokenizer = vqgan.ImageTokenizer.load(workdir / "vqgan")
  for record in records:
    assert len(record["codes"]) == SETTINGS.vqgan.image_tokens
    expected = tokenizer.decode(np.array([record["codes"]]))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / record["file"])), expected)
    assert len(record["neighbours"]) == record["retrieve"]
    assert all(n["license"] == "CC0-1.0" and n["attribution"] == "nobody" for n in record["neighbours"])
    assert record["log_prob"] < 0
    assert -1 <= record["clip_score"] <= 1
  assert len({r["file"] for r in records}) == 8
  assert (folder / "contact_sheet.png").exists()
  assert records[0]["codes"] != records[2]["codes"]  # Guidance changes the picture.
  assert records[0]["codes"] != records[4]["codes"]  # So do neighbours.


def test_the_trainers_grid(workdir, tmp_path):
  with jax.set_mesh(create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
    draw.sample_drawer(SETTINGS, workdir, tmp_path / "grid")(random_params(SETTINGS.model), 12)
  assert [p.name for p in (tmp_path / "grid").iterdir()] == ["step_000012.png"]


@pytest.mark.parametrize(("name", "expected"), [("Red  apple!", "red-apple"), ("...", "prompt"), ("x" * 99, "x" * 40)])
def test_slug(name, expected):
  assert draw.slug(name) == expected
