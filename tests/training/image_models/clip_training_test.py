import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config.tokenizers import CLIPConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.tokenizers.vqgan import to_float
from cm3leon_jax.training.image_models import clip_training as train_clip
from tests.data.raw_folder import write_raw
from tests.models.tiny import mesh_of
from tests.refusals import refused

TINY = CLIPConfig(
  resolution=16, image_encoder="vit", patch=4, image_width=64, image_layers=1,
  text_width=64, text_layers=1, text_length=6,
  embed_dim=16, steps=6, batch_size=8, text_dropout=0.2, checkpoint_every=3,
)  # fmt: skip
TEXT_SIZE = 50


def some_data(n=10, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(5, TEXT_SIZE, (n, 6), np.int32)
  images = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
  return train_clip.ClipData(images, tokens, np.arange(n, dtype=np.int32))


def train(config, data, folder, seed, devices=1):
  with jax.set_mesh(mesh_of(1, devices, 1)):
    return train_clip.train(config, TEXT_SIZE, data, folder, seed, {})


def oracle_loss(images, texts, scale, concepts):
  """Computes the loss of Radford et al. row by row, in fp64."""
  logits = scale * images.astype(np.float64) @ texts.astype(np.float64).T
  total = 0.0
  for matrix in (logits, logits.T):
    for i, row in enumerate(matrix):
      counted = [j for j in range(len(row)) if j == i or concepts[j] != concepts[i]]
      total += np.log(np.exp(row[counted]).sum()) - row[i]
  return total / (2 * len(logits))


def test_loss_is_the_oracle():
  rng = np.random.default_rng(0)
  images, texts = (
    np.asarray(clip_lib.normalize(rng.normal(size=(6, 8)).astype(np.float32))) for _ in range(2)
  )
  concepts = np.array([0, 1, 0, 2, 3, 3])
  loss = float(jax.jit(train_clip.contrastive_loss)(images, texts, 10.0, concepts))
  np.testing.assert_allclose(loss, oracle_loss(images, texts, 10.0, concepts), rtol=1e-5)
  # Negative control: all documents have different concepts.
  assert abs(loss - oracle_loss(images, texts, 10.0, np.arange(6))) > 1e-2
  assert np.isfinite(
    jax.jit(jax.grad(train_clip.contrastive_loss))(images, texts, 10.0, concepts)
  ).all()


def test_augmentation_keeps_shape_and_a_token():
  data = some_data()
  config = dataclasses.replace(TINY, shift=0.25, text_dropout=0.95)
  images = to_float(data.images)
  augment = jax.jit(train_clip.augment, static_argnums=3)
  x, tokens = augment(images, data.tokens, jax.random.key(0), config)
  assert x.shape == images.shape
  assert (np.asarray(tokens) != 0).any(1).all()
  assert (np.asarray(tokens) == 0).any()
  off = dataclasses.replace(TINY, shift=0.0, text_dropout=0.0, color_jitter=0.0)
  same, same_tokens = augment(images, data.tokens, jax.random.key(0), off)
  np.testing.assert_allclose(same, images, atol=1e-6)
  np.testing.assert_array_equal(same_tokens, data.tokens)


@pytest.mark.slow
def test_training_learns_its_pairs(tmp_path):
  config = dataclasses.replace(
    TINY, steps=60, batch_size=10, learning_rate=3e-3, text_dropout=0.0, shift=0.0
  )
  data, captions = some_data(), list("abcdefghij")
  clip = train(config, data, tmp_path, 0)
  recall = train_clip.text_to_image_recall(
    clip.embed_texts(list(data.tokens)), clip.embed_images(data.images), captions
  )
  assert recall["recall@1"] >= 0.9
  untrained = CLIP(config, TEXT_SIZE, clip_lib.init_params(config, TEXT_SIZE, jax.random.key(0)))
  before = train_clip.text_to_image_recall(
    untrained.embed_texts(list(data.tokens)), untrained.embed_images(data.images), captions
  )
  assert before["recall@1"] <= 0.5


def test_recall_in_literals():
  images = np.eye(6)
  texts = np.eye(6)[[0, 1, 2, 3, 5, 4]]
  recall = train_clip.text_to_image_recall(texts, images, list("abcdef"))
  assert recall == pytest.approx(
    {"candidates": 6, "recall@1": 4 / 6, "chance@1": 1 / 6, "recall@5": 4 / 6, "chance@5": 5 / 6}
  )
  same_captions = train_clip.text_to_image_recall(texts, images, list("abcdee"))
  assert same_captions["recall@1"] == 1
  assert same_captions["chance@1"] == pytest.approx((4 / 6 + 2 * 2 / 6) / 6)


@pytest.mark.parametrize("embedding", [np.ones((9, 2)), np.full((9, 2), np.nan)])
def test_a_constant_or_a_nan_finds_nothing(embedding):
  recall = train_clip.text_to_image_recall(embedding, embedding, list("abcdefghi"))
  assert recall["recall@1"] == recall["recall@5"] == 0


def test_a_recall_of_chance_is_refused():
  found = {"candidates": 9, "chance@1": 1 / 9, "chance@5": 5 / 9}
  with refused(UserError, "no better than chance", "config.clip.steps"):
    train_clip.check_recall({**found, "recall@1": 0.1, "recall@5": 5 / 9})
  train_clip.check_recall({**found, "recall@1": 0.1, "recall@5": 0.6})
  train_clip.check_recall({**found, "recall@1": 0.2, "recall@5": 0.1})
  few = {"candidates": 3, "chance@1": 1 / 3, "chance@5": 1.0}
  train_clip.check_recall({**few, "recall@1": 0.0, "recall@5": 1.0})


def write_pairs(folder, splits, images, num_shards):
  pairs = [
    {"key": f"k{i}", "caption": chr(97 + i) * 3, "concept": f"c{i}", "split": split}
    for i, split in enumerate(splits)
  ]
  write_raw(folder, pairs, images, num_shards=num_shards)


def encode(text):
  return np.array([ord(c) % 40 + 5 for c in text], np.int32)


def run_stage(root, config=TINY):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    return train_clip.train_clip(config, encode, TEXT_SIZE, root / "raw", root / "clip", 0, {})


def test_the_stage_leaves_a_loadable_clip_and_numbers(tmp_path):
  splits = ["heldout" if i % 4 == 3 else "train" for i in range(12)]
  write_pairs(tmp_path / "raw", splits, some_data(12).images, num_shards=3)
  summary = run_stage(tmp_path)
  assert (summary["pairs"], summary["candidates"], summary["steps"]) == (9, 3, 6)
  names = sorted(path.name for path in (tmp_path / "clip").iterdir())
  assert names == ["config.json", "metrics.jsonl", "params.safetensors", "training"]
  assert CLIP.load(tmp_path / "clip").embed_texts([encode("ab")]).shape == (1, 16)
