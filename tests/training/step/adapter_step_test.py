"""Trains adapters of a frozen decoder, and compares their gradients with plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.models import adapters, transformer
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState, eval_step, init_state, train_step
from tests.models.adapters_test import random_factors
from tests.models.tiny import CONFIG, mesh_of, model_logits, place, random_params
from tests.training.step.state_test import make_batch

ADAPTER = AdapterConfig(rank=3, alpha=6.0)
MODERN = dataclasses.replace(CONFIG, family="modern")
# The learning rate is 1 and the momentum is 0, so the updates are the negative gradients.
PLAIN = optax.sgd(1.0)


def placed_batch(seed=0):
  return {n: place(x, "batch", "length") for n, x in make_batch(seed).items()}


@functools.cache
def gradients(model, shape, accumulation=1, adapter=ADAPTER):
  """Returns the gradients of a step, its loss, and the bytes of the base before and after it."""
  with jax.set_mesh(mesh_of(*shape)):
    base, factors = random_params(model), random_factors(model, adapter)
    state = TrainState(jnp.zeros((), jnp.int32), factors, PLAIN.init(factors))
    step = functools.partial(train_step, model, PLAIN, 60, accumulation, tuned=adapter)
    before = jax.device_get((factors, base))
    after, metrics = jax.jit(step)(state, placed_batch(), base=base)
    difference = jax.tree.map(np.subtract, before[0], jax.device_get(after.params))
    return difference, float(metrics["loss"]), before[1], jax.device_get(base)


@pytest.mark.parametrize("model", [CONFIG, MODERN], ids=lambda m: m.family)
def test_gradients_are_those_of_plain_jax(model):
  """Differentiates the mean of all losses by the factors, through the merged parameters."""
  batch = make_batch()
  weights, targets = batch["loss_weights"], batch["targets"]

  def mean_nll(factors, base):
    merged = adapters.merge(base, factors, ADAPTER)
    logits = model_logits(model, merged, batch["inputs"], batch["positions"], batch["segment_ids"])
    nll = -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, model.vocab_size), -1)
    return jnp.sum(weights * nll) / jnp.sum(weights)

  with jax.set_mesh(mesh_of(1, 1, 1)):
    base, factors = random_params(model), random_factors(model, ADAPTER)
    value, expected = jax.jit(jax.value_and_grad(mean_nll))(factors, base)
  found, loss, before, after = gradients(model, (1, 1, 1))
  assert loss == pytest.approx(float(value), rel=1e-5)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.device_get(expected))):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))
    assert np.abs(b).max() > 1e-3
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(
  "model", [pytest.param(CONFIG, marks=pytest.mark.slow), MODERN], ids=lambda m: m.family
)
def test_a_mesh_and_accumulation_change_no_gradient(model):
  found = gradients(model, (1, 1, 1))
  split = gradients(model, (2, 2, 2), accumulation=2)
  assert split[1] == pytest.approx(found[1], rel=2e-5)
  for a, b in zip(jax.tree.leaves(split[0]), jax.tree.leaves(found[0])):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_have_exactly_the_losses_of_the_base(dtype):
  """The base is in the compute dtype. Full training evaluates fp32 parameters."""
  model = dataclasses.replace(MODERN, dtype=dtype)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, batch = random_params(model), placed_batch()
    base = jax.tree.map(lambda x: x.astype(dtype), params)
    factors = adapters.init(model, ADAPTER, jax.random.key(0))
    evaluate = jax.jit(functools.partial(eval_step, model, 60, tuned=ADAPTER))
    found = jax.device_get(evaluate(factors, batch, base=base))
    assert found == jax.device_get(evaluate(params, batch))
    changed = random_factors(model, ADAPTER)
    assert found != jax.device_get(evaluate(changed, batch, base=base))  # Negative control.


@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_only_adapters_are_in_the_state_and_the_loss_falls(name):
  config = OptimizerConfig(name=name, learning_rate=3e-2, warmup_steps=0, weight_decay=0.0)
  optimizer = create_optimizer(config, 20)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    base, batch = random_params(CONFIG), placed_batch()
    state = init_state(CONFIG, optimizer, jax.random.key(0), True, ADAPTER)
    size = transformer.count_params(state.params)
    assert size == adapters.count(CONFIG, ADAPTER)
    second = 0 if name == "muon" else size  # Muon has no second moment of matrices.
    counted = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1)
    assert counted == 3 * size + second
    step = jax.jit(
      functools.partial(train_step, CONFIG, optimizer, 60, 1, tuned=ADAPTER, ema_decay=0.5)
    )
    losses = []
    for _ in range(6):
      state, metrics = step(state, batch, base=base)
      losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.3


def test_a_frozen_table_has_no_gradient_in_the_program():
  """Without adapters, the loss sums the gradient of the table in an array [D, V]."""
  texts = []
  with jax.set_mesh(mesh_of(1, 1, 1)):
    base, batch = random_params(CONFIG), placed_batch()
    for tuned in (ADAPTER, None):
      state = init_state(CONFIG, PLAIN, jax.random.key(0), tuned=tuned)
      more = {"base": base, "tuned": tuned} if tuned else {}
      step = functools.partial(train_step, CONFIG, PLAIN, 60, 1)
      texts.append(str(jax.make_jaxpr(functools.partial(step, **more))(state, batch)))
  shape = f"f32[{CONFIG.width},{CONFIG.vocab_size}]"
  assert [shape in text for text in texts] == [False, True]
