"""Tests that sharing key heads equals repeating them, in training and in decoding."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.mesh import shard
from cm3leon_jax.models import adapters
from tests.models.adapters_test import random_factors
from tests.models.tiny import CONFIG, mesh_of, model_logits, random_params, with_repeated_heads

GROUPED = dataclasses.replace(CONFIG, family="modern", num_kv_heads=2)
REPEATED = dataclasses.replace(GROUPED, num_kv_heads=0)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, CONFIG.vocab_size, (8, 12)).astype(np.int32)
ROWS = TOKENS, np.tile(np.arange(12, dtype=np.int32), (8, 1)), np.ones_like(TOKENS)
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, params, weights):
  """Computes the gradient of the sum of all logits x weights."""
  return jax.grad(lambda params: (model_logits(config, params, *ROWS) * weights).sum())(params)


@pytest.mark.parametrize(("shape", "heads"), [((1, 1, 1), 1), ((2, 2, 2), 2)])
def test_logits_and_gradients_are_those_of_repeated_heads(shape, heads):
  config = dataclasses.replace(GROUPED, num_kv_heads=heads)
  with jax.set_mesh(mesh_of(*shape)):
    params = random_params(config)
    assert "qkv" not in params["blocks"]
    repeated = with_repeated_heads(params)
    found = model_logits(config, params, *ROWS)
    expected = model_logits(REPEATED, repeated, *ROWS)
    np.testing.assert_allclose(found, expected, **ROUNDING)
    weights = np.random.default_rng(1).normal(size=found.shape).astype(np.float32)
    mine, theirs = (
      jax.device_get(gradients(c, p, weights))["blocks"]
      for c, p in ((config, params), (REPEATED, repeated))
    )
    # The gradient of a key head is the sum over the heads that share it.
    keys = theirs["qkv"][:, 1:].reshape(*mine["kv"].shape[:3], heads, 4 // heads, -1).sum(4)
    np.testing.assert_allclose(mine["kv"], keys, **ROUNDING)
    np.testing.assert_allclose(mine["q"], theirs["qkv"][:, 0], **ROUNDING)
    np.testing.assert_allclose(mine["out"], theirs["out"], **ROUNDING)
    if heads == 2:  # Negative control: other heads share keys.
      other = with_repeated_heads(params, lambda x, n, axis: np.concatenate([x] * n, axis))
      wrong = np.asarray(model_logits(REPEATED, other, *ROWS))
      assert np.abs(wrong - np.asarray(expected)).max() > 0.1


def sizes(compiled):
  """Returns the number of elements of each array in a compiled program."""
  shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
  return {math.prod(map(int, shape.split(","))) for shape in shapes}


@pytest.mark.parametrize("dtype", cache_lib.DTYPES)
def test_the_cache_has_a_head_for_each_key_head(dtype):
  """A step over the cache repeats no keys: no array has the size of a cache of all heads."""
  N, G, T, H = GROUPED.num_heads, GROUPED.key_heads, 17, GROUPED.head_dim
  axes = ("batch", "length", "heads", "head_dim")
  mask = np.tile(np.tri(3, T, T - 3, dtype=bool), (4, 1, 1, 1))
  found = []
  with jax.set_mesh(mesh_of(1, 1, 1)):
    q, k, v = (RNG.normal(size=(4, n, h, H)).astype("float32") for n, h in ((3, N), (T, G), (T, G)))
    q = shard(q, *axes)
    for config in (GROUPED, REPEATED):
      cache = cache_lib.empty(config, 4, T, dtype)[0]
      assert cache.keys.shape == (4, config.key_heads, T, H)
      repeated = (shard(np.repeat(x, config.key_heads // G, axis=2), *axes) for x in (k, v))
      cache = cache.write(0, *repeated)
      attend = (
        jax.jit(lambda cache, q: cache.attend(q, jnp.asarray(mask))).lower(cache, q).compile()
      )
      found.append(np.asarray(attend(cache, q)))
      assert (4 * N * T * H in sizes(attend)) == (config is REPEATED)
  np.testing.assert_allclose(*found, **ROUNDING)
  assert np.abs(found[0]).max() > 0.5


def test_adapters_of_shared_keys_equal_merged_matrices():
  config = AdapterConfig(rank=3, alpha=6.0)

  def repeated(b):
    return shard(np.repeat(jax.device_get(b), 2, axis=2), "layers", None, "heads", "head_dim")

  with jax.set_mesh(mesh_of(1, 1, 2)):
    params, factors = random_params(GROUPED), random_factors(GROUPED, config)
    assert factors["k"]["b"].shape == (2, 3, 2, 8)  # [K, R, G, H]
    merged = adapters.merge(params, factors, config)
    full = adapters.merge(
      with_repeated_heads(params),
      {
        name: {**x, "b": repeated(x["b"]) if name in "kv" else x["b"]}
        for name, x in factors.items()
      },
      config,
    )
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(equal, with_repeated_heads(merged), full)
    assert np.abs(np.asarray(merged["blocks"]["kv"] - params["blocks"]["kv"])).max() > 0.1
