"""Compares adapters of the layers' matrices with matrices to which their product is added."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.mesh import shard, shardings
from cm3leon_jax.models import adapters, transformer
from tests.models.tiny import CONFIG, mesh_of, model_logits, random_arrays, random_params

MODERN = dataclasses.replace(CONFIG, family="modern")
FAMILIES = pytest.mark.parametrize("model", [CONFIG, MODERN], ids=lambda m: m.family)
CONFIGS = (
  AdapterConfig(rank=3, alpha=6.0),
  AdapterConfig(rank=2, targets=("v", "down")),
)
B, L = 8, 12


def tokens():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, CONFIG.vocab_size, (B, L)).astype(np.int32)
  return ids, np.tile(np.arange(L, dtype=np.int32), (B, 1)), np.ones((B, L), np.int32)


def types_of(model, config):
  return jax.eval_shape(lambda: adapters.init(model, config, jax.random.key(0)))


def random_factors(model, config, seed=1):
  """Returns adapters on the current mesh, whose factors B are not 0."""
  types = types_of(model, config)
  return jax.device_put(random_arrays(types, seed), shardings(types, jax.sharding.get_mesh()))


@functools.partial(jax.jit, static_argnums=(0, 3))
def adapted_logits(model, params, factors, config, batch):
  ids = (shard(jnp.asarray(x), "batch", "length") for x in batch)
  bound = transformer.bind(model, params)
  hidden = bound(*ids, adapters.scaled(factors, config.alpha))
  return transformer.logits(hidden, bound.output_table())


@pytest.mark.parametrize(("model", "config"), [(CONFIG, CONFIGS[1]), (MODERN, CONFIGS[0])])
def test_adapters_equal_merged_matrices(model, config):
  """On one device and on a mesh of (2, 2, 2)."""
  found = []
  for shape in ((1, 1, 1), (2, 2, 2)):
    with jax.set_mesh(mesh_of(*shape)):
      params, factors = random_params(model), random_factors(model, config)
      merged = jax.jit(functools.partial(adapters.merge, config=config))(params, factors)
      assert jax.tree.map(jax.typeof, merged) == jax.tree.map(jax.typeof, params)
      found.append(np.asarray(adapted_logits(model, params, factors, config, tokens())))
      found.append(np.asarray(model_logits(model, merged, *tokens())))
      plain = np.asarray(model_logits(model, params, *tokens()))
  for other in found[1:]:
    np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-4)
  assert np.abs(found[0] - plain).max() > 0.1


@FAMILIES
def test_the_sum_is_that_of_plain_matrices(model):
  """Uses numpy and the shapes of the paper: W + alpha / R x A B."""
  config = CONFIGS[0]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, factors = random_params(model), random_factors(model, config)
    merged = jax.device_get(jax.jit(adapters.merge, static_argnums=2)(params, factors, config))
  params, factors = jax.device_get((params, factors))
  D, A = model.width, model.num_heads * model.head_dim
  for name in config.matrices(model):
    w, found = (tree["blocks"]["qkv" if name in "qkv" else name] for tree in (params, merged))
    for layer in range(model.num_layers):
      parts = (x[layer, "qkv".index(name)] if name in "qkv" else x[layer] for x in (w, found))
      before, after = (x.reshape((A, D) if name == "out" else (x.shape[0], -1)) for x in parts)
      a = factors[name]["a"][layer].reshape(len(before), -1)
      b = factors[name]["b"][layer].reshape(3, -1)
      np.testing.assert_allclose(after, before + 2 * a @ b, rtol=1e-5, atol=1e-6)
  kept = {n: x for n, x in params.items() if n != "blocks"}
  jax.tree.map(np.testing.assert_array_equal, kept, {n: merged[n] for n in kept})


def test_new_adapters_change_no_bit():
  model = MODERN
  config = CONFIGS[0]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    init = jax.jit(adapters.init, static_argnums=(0, 1))
    params, factors = random_params(model), init(model, config, jax.random.key(0))
    found = adapted_logits(model, params, factors, config, tokens())
    np.testing.assert_array_equal(found, model_logits(model, params, *tokens()))
    merged = jax.jit(adapters.merge, static_argnums=2)(params, factors, config)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    std = float(jnp.std(factors["q"]["a"]))
  assert std == pytest.approx(model.width**-0.5, rel=0.2)


def test_parameters_are_counted_on_each_device():
  model = MODERN
  for config in CONFIGS:
    for shape in ((1, 1, 1), (1, 4, 2)):
      mesh = mesh_of(*shape)
      with jax.set_mesh(mesh):
        leaves = jax.tree.leaves(types_of(model, config))
      assert adapters.count(model, config) == sum(x.size for x in leaves)
      local = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
      assert adapters.count(model, config, mesh.shape) == local


def test_low_rank_literal():
  assert transformer.low_rank("BLD,DNH->BLNH") == ("BLD,Dr->BLr", "BLr,rNH->BLNH")
  assert transformer.low_rank("BLNh,NhD->BLD") == ("BLNh,Nhr->BLr", "BLr,rD->BLD")
