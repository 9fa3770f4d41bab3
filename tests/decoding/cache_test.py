"""Tests that attention over the cache equals attention over the keys and values written to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.mesh import shard
from cm3leon_jax.models.attention import masked_attention
from cm3leon_jax.planning.hlo import Program
from tests.models.tiny import CONFIG, mesh_of

R, T, N, H = 2, 6, CONFIG.num_heads, CONFIG.head_dim
# Tolerance relative to the largest entry of a result. int8 keys and values have errors of at most
# 1/254 of their largest entry.
INT8_ERROR = 0.02


@pytest.fixture(scope="module", autouse=True)
def mesh():
  with jax.set_mesh(mesh_of(1, 1, 1)):
    yield


@pytest.fixture(scope="module")
def qkv():
  axes = "batch", "length", "heads", "head_dim"
  return [shard(x, *axes) for x in jax.random.normal(jax.random.key(0), (3, R, T, N, H))]


def causal():
  return jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (R, 1, T, T))


def filled(k, v, capacity: int = T, dtype: str = "compute"):
  """Writes four tokens at once and two one by one; returns the cache of the first layer."""
  layer = cache_lib.empty(CONFIG, R, capacity, dtype)[0]
  for start, stop in ((0, 4), (4, 5), (5, 6)):
    layer = layer.write(start, k[:, start:stop], v[:, start:stop])
  return layer


def test_attention_over_the_cache_is_attention_over_what_was_written(qkv):
  q, k, v = qkv
  expected = np.asarray(masked_attention(q, k, v, causal()))
  np.testing.assert_allclose(filled(k, v).attend(q, causal()), expected, atol=1e-5)
  # Negative control: one key is missing.
  wrong = filled(k, v).write(2, 0 * k[:, :1], v[:, :1]).attend(q, causal())
  assert np.abs(np.asarray(wrong) - expected).max() > 0.1


def test_rows_are_copied_and_entries_added_at_the_end(qkv):
  q, k, v = qkv
  wider = jnp.pad(causal(), ((0, 0), (0, 0), (0, 0), (0, 3)))
  expected = np.asarray(masked_attention(q, k, v, causal()))
  grown = cache_lib.grown((filled(k, v),), 3)[0]
  np.testing.assert_allclose(grown.attend(q, wider), expected, atol=1e-5)
  copied = cache_lib.rows((filled(k, v),), jnp.array([1, 0, 1]), T - 1, T + 3)[0]
  assert copied.keys.shape == (3, N, T + 3, H)
  for row, of in enumerate((1, 0, 1)):
    np.testing.assert_array_equal(copied.values[row, :, : T - 1], v[of, 1:].swapaxes(0, 1))
    np.testing.assert_array_equal(copied.values[row, :, T - 1 :], 0)


def test_int8_is_near(qkv):
  q, k, v = qkv
  # Each token has its own scale of keys.
  k, v = k * jnp.array([0.1, 1, 3, 1, 1, 1])[None, :, None, None], v * 5
  expected = np.asarray(masked_attention(q, k, v, causal()))
  layer = filled(k, v, dtype="int8")
  assert layer.keys.dtype == jnp.int8

  def error(layer):
    found = np.asarray(layer.attend(q, causal()))
    return np.abs(found - expected).max() / np.abs(expected).max()

  assert 0 < error(layer) < INT8_ERROR
  # Negative controls: six bits instead of eight, and scales of other tokens.
  fewer = layer._replace(keys=layer.keys // 4 * 4, values=layer.values // 4 * 4)
  assert error(fewer) > INT8_ERROR
  assert error(layer._replace(key_scales=layer.key_scales[:, :, ::-1])) > INT8_ERROR


@pytest.mark.parametrize("dtype", cache_lib.DTYPES)
def test_rows_of_a_shard_are_gathered_without_a_transfer(dtype):
  """Given 8 rows on 4 devices and heads on 2, each device gathers only rows that it stores."""
  with jax.set_mesh(mesh_of(2, 2, 2)):
    values = jax.random.normal(jax.random.key(0), (8, T, N, H))
    values = shard(values, "batch", "length", "heads", "head_dim")
    cache = (cache_lib.empty(CONFIG, 8, T, dtype)[0].write(0, values, values),)
    index = jnp.array([1, 0, 1, 2, 2, 2, 4, 4, 5, 7, 6, 7])
    gather = jax.jit(lambda cache: cache_lib.rows(cache, index, T - 1, T + 3)).lower(cache)
    compiled = gather.compile()
    taken, whole = (np.asarray(x.values) for x in (compiled(cache)[0], cache[0]))
  np.testing.assert_array_equal(taken[:, :, : T - 1], whole[np.asarray(index)][:, :, 1:])
  assert Program(compiled.as_text()).collectives() == {}
