import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.tokenizers import quantizers, vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.tokenizers.tiny import tiny_config

BLOCKS = {"multipliers": (1, 2), "encoder_blocks": (0, 1), "decoder_blocks": (0, 1)}
CONFIG = tiny_config(resolution=16, stem=2, **BLOCKS)
NUM_CODES = 24


def _init(config):
  return jax.jit(lambda key: vqgan.init_params(config, NUM_CODES, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def tokenizer():
  return ImageTokenizer(CONFIG, NUM_CODES, _init(CONFIG), batch_size=4)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)


def _oracle(z, table):
  z, table = np.asarray(z, np.float64), np.asarray(table, np.float64)
  table = table / np.linalg.norm(table, axis=-1, keepdims=True)
  return np.linalg.norm(z[:, None] - table[None], axis=-1)


def _assert_nearest(indices, distances):
  chosen = np.take_along_axis(distances, np.asarray(indices)[:, None], 1)[:, 0]
  np.testing.assert_allclose(chosen, distances.min(1), rtol=0, atol=2e-6)


def test_space_to_depth_literals():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  folded = vqgan.space_to_depth(x, 2)
  np.testing.assert_array_equal(folded[0, 0], [[0, 1, 4, 5], [2, 3, 6, 7]])
  np.testing.assert_array_equal(vqgan.depth_to_space(folded, 2), x)


LOCAL = dataclasses.replace(
  CONFIG, stem=4, multipliers=(1,), encoder_blocks=(1,), decoder_blocks=(1,), local_codes=True
)


@pytest.mark.parametrize(
  ("config", "own_alone"), [(LOCAL, True), (dataclasses.replace(LOCAL, local_codes=False), False)]
)
def test_a_local_code_depends_on_its_own_square_alone(config, own_alone, images):
  """Changing all pixels outside of a square does not change the local code of the square."""
  model = vqgan.bind(config, NUM_CODES, _init(config))
  changed = np.copy(images[::-1])
  changed[:, 4:8, 8:12] = images[:, 4:8, 8:12]
  encode = jax.jit(model.encoder)
  before, after = (encode(vqgan.to_float(x)) for x in (images, changed))
  moved = np.abs(np.asarray(before - after)).max(-1)
  assert (moved[:, 1, 2].max() < 1e-5) == own_alone
  assert moved[:, 0, 0].min() > 1e-3


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_nearest_code_is_nearest(seed):
  rng = np.random.default_rng(seed)
  z = np.asarray(quantizers.l2_normalize(jnp.asarray(rng.normal(size=(50, 4)), jnp.float32)))
  codebook = vqgan.bind(
    CONFIG, NUM_CODES, _params_with_table(rng.normal(size=(NUM_CODES, 4)))
  ).codebook
  indices, distances = codebook.nearest(z), _oracle(z, codebook.table[...])
  assert indices.dtype == jnp.int32
  _assert_nearest(indices, distances)
  with pytest.raises(AssertionError):
    _assert_nearest((np.asarray(indices) + 1) % NUM_CODES, distances)


def _params_with_table(table):
  shapes = jax.eval_shape(lambda: vqgan.init_params(CONFIG, NUM_CODES, jax.random.key(0)))
  params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  params["codebook"]["table"] = jnp.asarray(table, jnp.float32)
  return params


def test_straight_through_gradient_reaches_encoder(tokenizer, images):
  x = vqgan.to_float(images)

  @jax.jit
  def gradients(params):
    def through(p):
      return jnp.mean((vqgan.bind(CONFIG, NUM_CODES, p)(x)[0] - x) ** 2)

    def cut(p):
      model = vqgan.bind(CONFIG, NUM_CODES, p)
      return jnp.mean((model.decoder(model(x)[2]) - x) ** 2)

    return jax.grad(through)(params), jax.grad(cut)(params)

  through, cut = gradients(tokenizer.params)

  def largest(tree):
    return max(np.abs(g).max() for g in jax.tree.leaves(tree))

  assert largest(through["encoder"]["conv_in"]) > 1e-6
  assert largest(through["codebook"]) == 0  # Only the codebook loss trains the codebook.
  assert largest(cut["encoder"]) == 0  # `cut` has no straight-through gradient.


def test_reconstruction_is_decoded_codes(tokenizer, images):
  codes = tokenizer.encode(images)
  assert codes.shape == (6, CONFIG.image_tokens)
  assert codes.dtype == np.int32
  assert codes.min() >= 0
  assert codes.max() < NUM_CODES
  decoded = tokenizer.decode(codes)
  assert decoded.shape == images.shape
  assert decoded.dtype == np.uint8
  y = jax.jit(lambda x: vqgan.bind(CONFIG, NUM_CODES, tokenizer.params)(vqgan.to_float(x))[0])(
    images
  )
  assert np.abs(decoded.astype(int) - np.asarray(vqgan.to_uint8(y))).max() <= 1


def test_batches_do_not_matter(tokenizer, images):
  alone = np.concatenate([tokenizer.encode(images[i : i + 1]) for i in range(len(images))])
  np.testing.assert_array_equal(tokenizer.encode(images), alone)
  assert tokenizer.encode(images[:0]).shape == (0, CONFIG.image_tokens)


def test_codes_are_in_raster_order():
  """Of 4 x 4 codes, code 3 is in the upper right corner, and code 12 in the lower left corner."""
  config = dataclasses.replace(
    CONFIG, stem=4, multipliers=(1,), encoder_blocks=(0,), decoder_blocks=(0,)
  )
  tokenizer = ImageTokenizer(config, NUM_CODES, _init(config), batch_size=2)
  codes = np.zeros((2, 16), np.int32)
  codes[1, 3] = 5
  plain, changed = tokenizer.decode(codes).astype(int)
  difference = np.abs(changed - plain).reshape(4, 4, 4, 4, 3).mean((1, 3, 4))
  assert difference[0, 3] > 5 * difference[3, 0]

  rng = np.random.default_rng(0)
  images = np.stack([rng.integers(0, 256, (16, 16, 3))] * 2).astype(np.uint8)
  images[1, :4, 12:] = 255 - images[1, :4, 12:]
  plain, changed = tokenizer.encode(images)
  assert (plain != changed)[3]
  assert not (plain != changed)[12]


def test_save_and_load_are_bit_equal(tokenizer, images, tmp_path):
  tokenizer.save(tmp_path)
  loaded = ImageTokenizer.load(tmp_path)
  assert (loaded.config, loaded.num_codes) == (CONFIG, NUM_CODES)
  assert jax.tree.structure(loaded.params) == jax.tree.structure(tokenizer.params)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, tokenizer.params)
  np.testing.assert_array_equal(loaded.encode(images), tokenizer.encode(images))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "params.safetensors"]
