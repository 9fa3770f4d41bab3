"""Trains groups of parameters, and compares their gradients with those of a full training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3leon_jax.config.groups import Groups
from cm3leon_jax.models import groups, transformer
from cm3leon_jax.training.step.state import TrainState, eval_step, train_step
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
  return pytest.mark.parametrize(
    ("model", "names"),
    [
      pytest.param(*case, marks=[pytest.mark.slow] * (i in slow), id=",".join(case[1]))
      for i, case in enumerate(CASES)
    ],
  )


def selected(params, names, model):
  """Selects the groups in numpy."""
  result = {}
  for name in names:
    group, _, part = name.partition(".")
    if group == "layers" and part:
      first, last = map(int, part.split("-"))
      result["blocks"] = jax.tree.map(lambda x: x[first : last + 1], params["blocks"])
    elif group == "layers":
      result |= {"blocks": params["blocks"], "final_norm": params["final_norm"]}
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


@cases(2, 5)
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
  assert all(x.any() for x in jax.tree.leaves(selected(moved, names, model)))
  count = sum(x.sum() for x in jax.tree.leaves(moved))
  assert count == sum(x.sum() for x in jax.tree.leaves(selected(moved, names, model)))


@cases(0, 2, 4, 5)
def test_a_mesh_and_accumulation_change_no_gradient(model, names):
  found, split = trained(model, names, (1, 1, 1)), trained(model, names, (2, 2, 2), 2)
  assert split[1] == pytest.approx(found[1], rel=2e-5)
  for a, b in zip(jax.tree.leaves(split[0]), jax.tree.leaves(found[0])):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


@cases()
def test_the_traced_products_are_the_counted_ones(model, names):
  """Gradients of frozen parameters, and of all before the first trained one, are not computed."""
  tuned, length = Groups(names, TEXT), 16
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, batch = random_params(model), placed_batch()
    counts = []
    for one in (tuned, None):
      own = groups.split(params, one, model) if one else params
      state = TrainState(jnp.zeros((), jnp.int32), own, PLAIN.init(own))
      step = functools.partial(train_step, model, PLAIN, TEXT, 1, tuned=one)
      counts.append(jax.jit(step).trace(state, batch, base=groups.rest(params, tuned) if one else None))
  found, full = (product_flops(one.jaxpr) for one in counts)
  assert found < full
  print(names, found, full, flops.model_flops(model, 128, length, tuned), flops.model_flops(model, 128, length))
