import dataclasses

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.tokenizers import levels_of
from cm3leon_jax.tokenizers import quantizers
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.image_models import vqgan_training
from tests.tokenizers.tiny import random_images, tiny_config

# N encodings, E code width, K codes.

CONFIG = tiny_config(code_dim=2, steps=10)
NUM_CODES = 24
KINDS = ("", "fsq")


def config_of(kind, **fields):
  return dataclasses.replace(CONFIG, quantizer=kind, **fields)


def make(kind, num_codes=NUM_CODES, code_dim=2):
  return quantizers.make(kind, num_codes, code_dim, nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def images():
  return random_images()


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_its_own_nearest_code(kind):
  codebook, indices = make(kind), np.arange(NUM_CODES).reshape(4, 6)
  q = codebook(indices)
  assert q.shape == (4, 6, 2)
  np.testing.assert_array_equal(codebook.nearest(q), indices)
  assert codebook.nearest(q).dtype == jnp.int32


@pytest.mark.parametrize("num_codes", [24, 105, 1_000, 8_192])
def test_indices_of_fsq_make_a_round_trip_over_all_codes(num_codes):
  levels = levels_of(num_codes)
  codebook, indices = make("fsq", num_codes, len(levels)), np.arange(num_codes)
  q = np.asarray(codebook(indices))
  np.testing.assert_array_equal(codebook.nearest(q), indices)
  assert len(np.unique(q, axis=0)) == num_codes
  assert [len(np.unique(channel)) for channel in q.T] == list(levels)


def test_fsq_of_even_and_odd_levels_in_literals():
  """6 levels are -3 / 3, ..., 2 / 3, and 4 levels are -2 / 2, ..., 1 / 2."""
  codebook = make("fsq")
  np.testing.assert_allclose(codebook(jnp.array([0, 5, 23])), [[-1, -1], [2 / 3, -1], [2 / 3, 0.5]])
  far = codebook.prepare(jnp.array([[-99.0, -99.0], [99.0, 99.0], [0.0, 0.0]]))
  np.testing.assert_array_equal(codebook.nearest(far), [0, 23, 3 + 2 * 6])
  odd = make("fsq", 15)
  np.testing.assert_allclose(odd.prepare(jnp.zeros((1, 2))), [[0, 0]], atol=1e-6)
  assert odd.nearest(odd.prepare(jnp.array([[99.0, -99.0]]))) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_quantizer_trains_and_its_tokenizer_is_saved(kind, images, tmp_path):
  config = config_of(kind)
  state = vqgan_training.init_state(config, NUM_CODES, 0)
  losses = []
  for _ in range(8):
    state, metrics = vqgan_training.train_step(state, images, config, False)
    losses.append(float(metrics["mse"]))
  assert losses[-1] < losses[1]
  assert int(state["usage"].sum()) == 8 * 4 * CONFIG.image_tokens
  tokenizer = ImageTokenizer(config, NUM_CODES, state["params"])
  tokenizer.save(tmp_path)
  loaded = ImageTokenizer.load(tmp_path)
  assert loaded.config.quantizer == kind
  codes = loaded.encode(images)
  np.testing.assert_array_equal(codes, tokenizer.encode(images))
  np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))
  assert ("codebook" in state["params"]) == (kind != "fsq")
