import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config.tokenizers import CLIPConfig
from cm3leon_jax.errors import UserError
from tests.models.tiny import random_arrays
from tests.refusals import refused

TINY = CLIPConfig(
  resolution=16, image_encoder="conv", patch=4, image_width=64, image_layers=1,
  text_width=64, text_layers=1, text_length=6, embed_dim=16, steps=4, batch_size=4,
)  # fmt: skip
CONFIGS = {"conv": TINY, "vit": dataclasses.replace(TINY, image_encoder="vit")}
TEXT_SIZE = 50


def make(config=TINY, seed=0):
  types = jax.eval_shape(lambda: clip_lib.init_params(config, TEXT_SIZE, jax.random.key(0)))
  return CLIP(config, TEXT_SIZE, jax.device_put(random_arrays(types, seed)))


def some_images(n, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), np.uint8)


TEXTS = [np.arange(3, 3 + n, dtype=np.int32) for n in (1, 4, 6, 2)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_embeddings_are_unit_norm_and_independent_of_their_batch(kind):
  clip = make(CONFIGS[kind])
  images = some_images(clip_lib.EMBED_BATCH + 3)
  embedded, texts = clip.embed_images(images), clip.embed_texts(TEXTS)
  assert embedded.shape == (len(images), 16)
  assert embedded.dtype == texts.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(clip.embed_images(images[-1:])[0], embedded[-1], atol=1e-6)
  np.testing.assert_allclose(clip.embed_texts(TEXTS[1:2])[0], texts[1], atol=1e-6)
  small = clip.in_batches(3)
  assert (small.batch_size, clip.batch_size) == (3, clip_lib.EMBED_BATCH)
  np.testing.assert_allclose(small.embed_images(images[:7]), embedded[:7], atol=1e-6)
  np.testing.assert_allclose(small.embed_texts(TEXTS), texts, atol=1e-6)
  assert np.abs(embedded[0] - embedded[1]).max() > 1e-3
  assert np.abs(texts[0] - texts[1]).max() > 1e-3


def test_padding_does_not_matter():
  clip = make()
  embed = jax.jit(lambda tokens: clip_lib.bind(TINY, TEXT_SIZE, clip.params).embed_texts(tokens))
  short, long = clip_lib.pad_texts(TEXTS[1:2], 4), clip_lib.pad_texts(TEXTS[1:2], 6)
  np.testing.assert_allclose(embed(short), embed(long), atol=1e-6)
  long[0, -1] = 9  # Negative control: replaces padding by a token.
  assert np.abs(embed(short) - embed(long)).max() > 1e-3


def test_pad_texts_in_literals():
  assert clip_lib.pad_texts([np.array([7, 8]), np.array([5, 6, 7, 8])], 3).tolist() == [
    [7, 8, 0],
    [5, 6, 7],
  ]
  with refused(UserError, "no tokens"):
    clip_lib.pad_texts([np.array([], np.int32)], 3)


def test_patches_in_literals():
  image = np.arange(2 * 4 * 3, dtype=np.float32).reshape(1, 2, 4, 3)
  result = np.asarray(clip_lib.patches(jax.device_put(image), 2))
  assert result.shape == (1, 1, 2, 12)
  assert result[0, 0, 1].tolist() == [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize("kind", CONFIGS)
def test_save_and_load(kind, tmp_path):
  clip = make(CONFIGS[kind])
  clip.save(tmp_path)
  loaded = CLIP.load(tmp_path)
  assert (loaded.config, loaded.text_size) == (clip.config, TEXT_SIZE)
  np.testing.assert_array_equal(
    loaded.embed_images(some_images(3)), clip.embed_images(some_images(3))
  )
  np.testing.assert_array_equal(loaded.embed_texts(TEXTS), clip.embed_texts(TEXTS))


def test_clip_score_is_the_cosine_of_each_pair():
  clip = make()
  scores = clip_lib.clip_score(clip, some_images(4), TEXTS)
  expected = (
    clip.embed_images(some_images(4)).astype(np.float64)
    @ clip.embed_texts(TEXTS).astype(np.float64).T
  )
  np.testing.assert_allclose(scores, np.diag(expected), atol=1e-6)
  with refused(ValueError, "one caption per image"):
    clip_lib.clip_score(clip, some_images(3), TEXTS)
