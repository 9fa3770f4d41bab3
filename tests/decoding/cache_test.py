"""Tests that attention over the cache equals attention over the keys and values written to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.models.attention import masked_attention
from cm3leon_jax.planning.hlo import Program
from tests.models.tiny import CONFIG, mesh_of, place

R, T, N, H = 2, 6, CONFIG.num_heads, CONFIG.head_dim
HEADS = "batch", "length", "heads", "head_dim"
# Tolerance relative to the largest entry of a result. int8 keys and values have errors of at most
# 1/254 of their largest entry.
INT8_ERROR = 0.02


@pytest.fixture(scope="module", autouse=True)
def mesh():
  with jax.set_mesh(mesh_of(1, 1, 1)):
    yield


@pytest.fixture(scope="module")
def qkv():
  return random_heads(3, R)


def random_heads(*sizes):
  arrays = np.random.default_rng(0).normal(size=(*sizes, T, N, H)).astype(np.float32)
  return [place(x, *HEADS) for x in arrays]


CAUSAL = np.broadcast_to(np.tril(np.ones((T, T), bool)), (R, 1, T, T))
attend, expected = jax.jit(cache_lib.LayerCache.attend), jax.jit(masked_attention)


@functools.partial(jax.jit, static_argnums=(2, 3))
def filled(k, v, capacity: int = T, dtype: str = "compute"):
  """Writes four tokens at once and two one by one; returns the cache of the first layer."""
  layer = cache_lib.empty(CONFIG, R, capacity, dtype)[0]
  for start, stop in ((0, 4), (4, 5), (5, 6)):
    layer = layer.write(start, k[:, start:stop], v[:, start:stop])
  return layer


def test_attention_over_the_cache_is_attention_over_what_was_written(qkv):
  q, k, v = qkv
  right = np.asarray(expected(q, k, v, CAUSAL))
  np.testing.assert_allclose(attend(filled(k, v), q, CAUSAL), right, atol=1e-5)
  # Negative control: one key is missing.
  without = jax.jit(lambda layer, k, v: layer.write(2, 0 * k[:, :1], v[:, :1]))
  wrong = attend(without(filled(k, v), k, v), q, CAUSAL)
  assert np.abs(np.asarray(wrong) - right).max() > 0.1


def test_rows_are_copied_and_entries_added_at_the_end(qkv):
  q, k, v = qkv
  wider = np.pad(CAUSAL, ((0, 0), (0, 0), (0, 0), (0, 3)))

  @jax.jit
  def changed(cache, index):
    return cache_lib.grown(cache, 3)[0], cache_lib.rows(cache, index, T - 1, T + 3)[0]

  grown, copied = changed((filled(k, v),), np.array([1, 0, 1], np.int32))
  right = expected(q, k, v, CAUSAL)
  np.testing.assert_allclose(attend(grown, q, wider), right, atol=1e-5)
  assert copied.keys.shape == (3, N, T + 3, H)
  values, v = np.asarray(copied.values), np.asarray(v)
  for row, of in enumerate((1, 0, 1)):
    np.testing.assert_array_equal(values[row, :, : T - 1], v[of, 1:].swapaxes(0, 1))
    np.testing.assert_array_equal(values[row, :, T - 1 :], 0)


def test_int8_is_near(qkv):
  q, k, v = qkv
  # Each token has its own scale of keys.
  of_tokens = np.float32([0.1, 1, 3, 1, 1, 1])[:, None, None]
  k, v = (place(np.asarray(x) * by, *HEADS) for x, by in ((k, of_tokens), (v, np.float32(5))))
  right = np.asarray(expected(q, k, v, CAUSAL))
  layer = filled(k, v, dtype="int8")
  assert layer.keys.dtype == jnp.int8

  def error(**changed):
    laid_out = {name: place(x, *cache_lib.AXES) for name, x in changed.items()}
    found = np.asarray(attend(layer._replace(**laid_out), q, CAUSAL))
    return np.abs(found - right).max() / np.abs(right).max()

  assert 0 < error() < INT8_ERROR
  # Negative controls: six bits instead of eight, and scales of other tokens.
  keys, values, scales = map(np.asarray, (layer.keys, layer.values, layer.key_scales))
  assert error(keys=keys // 4 * 4, values=values // 4 * 4) > INT8_ERROR
  assert error(key_scales=scales[:, :, ::-1]) > INT8_ERROR


@pytest.mark.parametrize("dtype", cache_lib.DTYPES)
def test_rows_of_a_shard_are_gathered_without_a_transfer(dtype):
  """Given 8 rows on 4 devices and heads on 2, each device gathers only rows that it stores."""
  with jax.set_mesh(mesh_of(2, 2, 2)):
    [values] = random_heads(1, 8)
    fill = jax.jit(lambda x: (cache_lib.empty(CONFIG, 8, T, dtype)[0].write(0, x, x),))
    cache, index = fill(values), jnp.array([1, 0, 1, 2, 2, 2, 4, 4, 5, 7, 6, 7])
    gather = jax.jit(lambda cache: cache_lib.rows(cache, index, T - 1, T + 3)).lower(cache)
    compiled = gather.compile()
    taken, whole = (np.asarray(x.values) for x in (compiled(cache)[0], cache[0]))
  np.testing.assert_array_equal(taken[:, :, : T - 1], whole[np.asarray(index)][:, :, 1:])
  assert Program(compiled.as_text()).collectives() == {}
