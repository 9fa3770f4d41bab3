"""Quantizers against small literal oracles."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.tokenizers import quantizers, vqgan
from cm3leon_jax.tokenizers.config import levels_of
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.small import vqgan_training
from tests.tokenizers.tiny import random_images, tiny_config

# N encodings, E code width, K codes.

CONFIG = tiny_config(code_dim=2, steps=10)
NUM_CODES = 24
KINDS = ("", "ema", "simvq", "fsq", "rotation")
TRAINED = [
  kind if kind in ("", "fsq") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
]


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_receives_the_codes(kind):
  """Whatever the gradient is, the value is that of the code."""
  codebook = make(kind)
  z = codebook.prepare(jax.random.normal(jax.random.key(1), (50, 2)))
  q = codebook(codebook.nearest(z))
  assert jnp.abs(z - q).max() > 1e-2
  np.testing.assert_allclose(codebook.pass_through(z, q), q, atol=1e-6)


def test_the_average_of_codes_in_literals():
  """Two codes, three encodings: code 0 takes the first two, code 1 the last."""
  averages = {"counts": jnp.array([1.0, 4.0]), "sums": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
  z = jnp.array([[2.0, 0.0], [0.0, 4.0], [6.0, 6.0]])
  new = quantizers.update_averages(averages, z, jnp.array([0, 0, 1]), decay=0.75)
  np.testing.assert_allclose(new["counts"], [0.75 + 0.25 * 2, 3.0 + 0.25])
  np.testing.assert_allclose(new["sums"], [[0.75 + 0.5, 1.0], [1.5, 1.5 + 1.5]])
  table = quantizers.averaged_table(new, jnp.zeros((2, 2)))
  np.testing.assert_allclose(table, [[1.0, 0.8], [1.5 / 3.25, 3.0 / 3.25]], rtol=1e-6)


def test_a_code_whose_average_is_forgotten_stays():
  averages = {"counts": jnp.array([0.0, 2.0]), "sums": jnp.array([[0.0, 0.0], [1.0, 3.0]])}
  table = quantizers.averaged_table(averages, jnp.array([[7.0, 8.0], [9.0, 9.0]]))
  np.testing.assert_allclose(table, [[7.0, 8.0], [0.5, 1.5]])


@pytest.mark.slow
def test_a_step_moves_the_codes_of_ema_to_their_encodings_and_nothing_else(images):
  config = config_of("ema")
  state = vqgan_training.init_state(config, NUM_CODES, 0)
  old = jax.tree.map(np.array, state)
  model = vqgan.bind(config, NUM_CODES, state["params"])
  _, z, _, indices = model(vqgan.to_float(images))
  new, _ = vqgan_training.train_step(state, images, config, False)
  table = old["params"]["codebook"]["table"]
  units = table / np.linalg.norm(table, axis=1, keepdims=True)
  for code in range(NUM_CODES):
    mine = np.asarray(z)[np.asarray(indices) == code]
    expected = (0.99 * units[code] + 0.01 * mine.sum(0)) / (0.99 + 0.01 * len(mine))
    np.testing.assert_allclose(new["params"]["codebook"]["table"][code], expected, rtol=1e-4)


def test_rotation_is_the_explicit_matrix():
  """Its value is q, and the gradient of z is the transposed scaled rotation from z to q."""
  rng = np.random.default_rng(0)
  z, q, g = rng.normal(size=(3, 20, 3)).astype(np.float32)
  value, pull = jax.vjp(quantizers.rotate, jnp.asarray(z), jnp.asarray(q))
  np.testing.assert_allclose(value, q, rtol=1e-4, atol=1e-5)
  found, of_codes = pull(jnp.asarray(g))
  assert not np.asarray(of_codes).any()
  for one_z, one_q, one_g, gradient in zip(z, q, g, np.asarray(found)):
    lengths = np.linalg.norm(one_z), np.linalg.norm(one_q)
    a, b = one_z / lengths[0], one_q / lengths[1]
    # Rodrigues' formula: the rotation about the normal of both by the angle between them.
    v = np.cross(a, b)
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    matrix = np.eye(3) + cross + cross @ cross / (1 + a @ b)
    np.testing.assert_allclose(
      matrix @ one_z * lengths[1] / lengths[0], one_q, rtol=1e-3, atol=1e-5
    )
    expected = lengths[1] / lengths[0] * matrix.T @ one_g
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected - one_g).max() > 1e-3  # Straight through it were g itself.


@pytest.mark.parametrize("num_codes", [24, 105, 1_000, 8_192])
def test_indices_of_fsq_make_a_round_trip_over_all_codes(num_codes):
  levels = levels_of(num_codes)
  codebook, indices = make("fsq", num_codes, len(levels)), np.arange(num_codes)
  q = np.asarray(codebook(indices))
  np.testing.assert_array_equal(codebook.nearest(q), indices)
  assert len(np.unique(q, axis=0)) == num_codes
  assert [len(np.unique(channel)) for channel in q.T] == list(levels)


def test_fsq_of_even_and_odd_levels_in_literals():
  """24 = 6 x 4 levels: -3 .. 2 in steps of 1 / 3 and -2 .. 1 in steps of 1 / 2."""
  codebook = make("fsq")
  np.testing.assert_allclose(codebook(jnp.array([0, 5, 23])), [[-1, -1], [2 / 3, -1], [2 / 3, 0.5]])
  far = codebook.prepare(jnp.array([[-99.0, -99.0], [99.0, 99.0], [0.0, 0.0]]))
  np.testing.assert_array_equal(codebook.nearest(far), [0, 23, 3 + 2 * 6])
  odd = make("fsq", 15)
  np.testing.assert_allclose(odd.prepare(jnp.zeros((1, 2))), [[0, 0]], atol=1e-6)
  assert odd.nearest(odd.prepare(jnp.array([[99.0, -99.0]]))) == 4


def test_the_gradient_of_one_code_of_simvq_moves_all_codes():
  """With a plain codebook it moves that code alone."""

  def moved(kind):
    codebook = make(kind)
    graphdef, params = nnx.split(codebook)

    def first_code(params):
      return jnp.sum(nnx.merge(graphdef, params)(jnp.array([0]))[0] * jnp.array([1.0, -2.0]))

    grads = nnx.to_pure_dict(jax.grad(first_code)(params))
    new = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.to_pure_dict(params), grads)
    if kind == "simvq":
      np.testing.assert_array_equal(new["table"], codebook.table[...])  # Frozen.
    nnx.replace_by_pure_dict(params, new)
    after = nnx.merge(graphdef, params).vectors()
    return np.abs(np.asarray(after - codebook.vectors())).max(1) > 1e-5

  assert moved("simvq").all()
  assert moved("").tolist() == [True] + [False] * (NUM_CODES - 1)


def test_simvq_starts_at_its_frozen_codes():
  params = vqgan.init_params(config_of("simvq"), NUM_CODES, jax.random.key(0))
  units = quantizers.l2_normalize(params["codebook"]["table"])
  vectors = vqgan.code_vectors(config_of("simvq"), NUM_CODES, params)
  np.testing.assert_allclose(vectors, units, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINED)
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


@pytest.mark.parametrize("kind", TRAINED)
def test_only_codes_that_stand_alone_restart(kind):
  config = config_of(kind, steps=1_000, restart_every=10, restart_until=0.5)
  found = [done for done in range(1, 1_000) if vqgan_training.restarts(config, done)]
  assert found == ([] if kind in ("simvq", "fsq") else list(range(10, 500, 10)))


def test_a_restarted_code_of_ema_begins_its_average_there(images):
  config = config_of("ema")
  state = vqgan_training.init_state(config, NUM_CODES, 0)
  state["usage"] = jnp.arange(NUM_CODES, dtype=jnp.int32) % 2
  state = vqgan_training.restart_dead_codes(state, images, config, jax.random.key(0))
  table = state["params"]["codebook"]["table"]
  averaged = quantizers.averaged_table(state["averages"], table)
  dead = np.arange(NUM_CODES) % 2 == 0
  np.testing.assert_array_equal(averaged[dead], table[dead])
