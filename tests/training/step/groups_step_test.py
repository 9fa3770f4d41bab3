"""Trains groups of parameters, and compares their gradients with those of a full training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3leon_jax.config.groups import Groups
from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.mesh import abstract
from cm3leon_jax.models import groups, transformer
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState, eval_step, init_state, train_step
from cm3leon_jax.training.watch import flops
from tests.models.tiny import CONFIG, mesh_of, random_params
from tests.training.step.adapter_step_test import placed_batch
from tests.training.watch.flops_test import product_flops

TEXT = 60  # Rows of the tables before those of the 36 image codes.
MODERN = dataclasses.replace(CONFIG, family="modern", num_layers=3)
PLAIN = optax.sgd(1.0)  # The updates are the negative gradients.
CASES = [
  (MODERN, ("head.image",)),
  (MODERN, ("embed.image", "head")),
  (MODERN, ("layers",)),
  (MODERN, ("layers.1-1", "head.image")),
  (CONFIG, ("embed.image",)),
  (CONFIG, ("embed",)),
]


def cases(*slow):
  marked = [
    pytest.param(*case, marks=[pytest.mark.slow] * (i in slow), id=",".join(case[1]))
    for i, case in enumerate(CASES)
  ]
  return pytest.mark.parametrize(("model", "names"), marked)


def selected(params, names, model):
  """Selects the groups in numpy."""
  result = {}
  for group, _, part in (name.partition(".") for name in names):
    layers = (
      np.arange(int(part[0]), int(part[2]) + 1) if group == "layers" and part else slice(None)
    )
    if group == "layers":
      result["blocks"] = jax.tree.map(lambda x, at=layers: x[at], params["blocks"])
      result |= {} if part else {"final_norm": params["final_norm"]}
    elif part:
      result[group] = params[group][TEXT:]
    else:
      result |= {key: params[key] for key in {group, "positions"} & params.keys()}
  return result


@functools.cache
def trained(model, names, shape, accumulation=1):
  """Returns the gradients of a step, its metrics, and the merged parameters before and after."""
  tuned = Groups(names, TEXT) if names else None
  with jax.set_mesh(mesh_of(*shape)):
    params, base = random_params(model), None
    before = jax.device_get(params)
    if tuned:
      base = groups.rest(params, tuned)
      params = jax.jit(groups.split, static_argnums=(1, 2))(params, tuned, model)
    state = TrainState(jnp.zeros((), jnp.int32), params, PLAIN.init(params))
    step = functools.partial(train_step, model, PLAIN, TEXT, accumulation, tuned=tuned)
    start = jax.device_get(params)
    after, metrics = jax.jit(step)(state, placed_batch(), base=base)
    merged = after.params
    if tuned:
      merge = functools.partial(groups.merge, tuned=tuned, model=model)
      merged = jax.jit(merge)(random_params(model), after.params)
    found = jax.tree.map(np.subtract, start, jax.device_get(after.params))
    return found, float(metrics["loss"]), before, jax.device_get(merged)


@cases(1, 2, 5)
def test_gradients_are_those_of_a_full_training_and_nothing_else_moves(model, names):
  full, expected_loss, _, _ = trained(model, (), (1, 1, 1))
  found, loss, before, after = trained(model, names, (1, 1, 1))
  assert loss == pytest.approx(expected_loss, rel=1e-6)
  expected = selected(full, names, model)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max()))
    assert np.abs(b).max() > 1e-3
  moved = jax.tree.map(lambda a, b: a != b, before, after)
  within = [x.sum() for x in jax.tree.leaves(selected(moved, names, model))]
  assert all(within)
  assert sum(within) == sum(x.sum() for x in jax.tree.leaves(moved))


@cases(0, 1, 2, 4, 5)
def test_a_mesh_and_accumulation_change_no_gradient(model, names):
  found, split = trained(model, names, (1, 1, 1)), trained(model, names, (2, 2, 2), 2)
  assert split[1] == pytest.approx(found[1], rel=2e-5)
  for a, b in zip(jax.tree.leaves(split[0]), jax.tree.leaves(found[0])):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


@cases()
def test_the_traced_products_are_the_counted_ones(model, names):
  """Gradients of frozen parameters, and of all before the first trained one, are not computed."""
  tuned, found = Groups(names, TEXT), []
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, batch = random_params(model), placed_batch()
    for one in (tuned, None):
      own = groups.split(params, one, model) if one else params
      state = TrainState(jnp.zeros((), jnp.int32), own, PLAIN.init(own))
      base = groups.rest(params, tuned) if one else None
      step = functools.partial(train_step, model, PLAIN, TEXT, 1, tuned=one)
      products = product_flops(jax.jit(step).trace(state, batch, base=base).jaxpr)
      back = tuned.backward(model) if one else model.num_layers
      # The program multiplies all keys, of which half are counted.
      beyond = (4 * model.num_layers + 8 * back) * model.width * 16 / 2 * 128
      assert products == flops.model_flops(model, 128, 16, one) + beyond
      found.append(products)
  assert found[0] < found[1]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@cases()
def test_the_state_has_only_the_groups(model, names, name):
  tuned, config = Groups(names, TEXT), OptimizerConfig(name=name)
  optimizer = create_optimizer(config, 20)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, batch = random_params(model), placed_batch()
    init = functools.partial(init_state, model, optimizer, tuned=tuned, averaged=True)
    state = abstract(jax.eval_shape(init, jax.random.key(0)), jax.sharding.get_mesh())
    step = functools.partial(train_step, model, optimizer, TEXT, 1, tuned=tuned, ema_decay=0.9)
    after, _ = jax.eval_shape(step, state, batch, base=groups.rest(params, tuned))
  assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
  expected = selected(jax.device_get(params), names, model)
  assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, expected)
  size = transformer.count_params(expected)
  matrices = [x for x in jax.tree.leaves(expected.get("blocks", {})) if x.ndim > 2]
  second = size - sum(x.size for x in matrices) * (name == "muon")
  second += 3 * (name == "muon")  # Its coefficients.
  assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 3 * size + second


def test_the_first_losses_are_exactly_those_of_the_base():
  names = "embed.image", "layers.1-1", "head.image"
  model, tuned = dataclasses.replace(MODERN, dtype="bfloat16"), Groups(names, TEXT)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, batch = random_params(model), placed_batch()
    base = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    evaluate = functools.partial(eval_step, model, TEXT)
    own = groups.split(params, tuned, model)
    found = jax.jit(functools.partial(evaluate, tuned=tuned))(own, batch, base=base)
    assert jax.device_get(found) == jax.device_get(jax.jit(evaluate)(params, batch))
