import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.mesh import shard
from cm3leon_jax.training.config import OptimizerConfig
from cm3leon_jax.training.step import grpo, numerics
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState, init_state, train_step
from tests.models.tiny import CONFIG, mesh_of, random_params
from tests.refusals import refused
from tests.training.step import grpo_test, state_test

NAN, INF = float("nan"), float("inf")


def laid_out(batch):
  return {name: shard(jnp.asarray(x), "batch", "length") for name, x in batch.items()}


def poisoned(seed, value):
  batch = state_test.make_batch(seed)
  batch["loss_weights"][3, 5] = value
  return batch


def equal(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)


@pytest.mark.parametrize(
  ("shape", "accumulation", "name", "value"),
  [
    ((2, 2, 2), 2, "adamw", INF),
    pytest.param((1, 1, 1), 1, "adamw", NAN, marks=pytest.mark.slow),
    pytest.param((1, 2, 2), 1, "muon", NAN, marks=pytest.mark.slow),
  ],
)
def test_a_poisoned_batch_leaves_no_trace(shape, accumulation, name, value):
  """After a bad batch, the run continues bit for bit as if the batch did not exist."""
  optimizer = create_optimizer(
    OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=2, skip_above=9.0), 10
  )
  with jax.set_mesh(mesh_of(*shape)):
    init = jax.jit(lambda: init_state(CONFIG, optimizer, jax.random.key(0), averaged=True))
    step = jax.jit(
      lambda s, b: train_step(CONFIG, optimizer, 60, accumulation, s, b, ema_decay=0.01),
      donate_argnums=0,
    )

    def run(batches):
      state, skipped = init(), []
      for batch in batches:
        state, metrics = step(state, laid_out(batch))
        skipped.append(float(metrics["skipped"]))
      return state, skipped

    good = [state_test.make_batch(i) for i in range(3)]
    state, skipped = run([good[0], poisoned(7, value), good[1], good[2]])
    expected, none = run(good)
    assert (skipped, none) == ([0, 1, 0, 0], [0, 0, 0])
    assert (int(state.step), int(expected.step)) == (4, 3)
    found = (state.params, state.opt_state, state.ema)
    assert equal(found, (expected.params, expected.opt_state, expected.ema))
    for x, first in zip(jax.tree.leaves(state), jax.tree.leaves(init()), strict=True):
      assert x.sharding.is_equivalent_to(first.sharding, x.ndim)


@pytest.mark.slow
def test_a_poisoned_advantage_leaves_no_trace():
  model = grpo_test.model_config("modern")
  optimizer = create_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)
  values = np.float32([1, -1] * 4)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, reference = random_params(model), random_params(model, seed=1)
    state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params), params)
    fixed = model, optimizer, grpo_test.VOCAB.text_size, 0.1, 1.0
    step = jax.jit(functools.partial(grpo.policy_step, *fixed, ema_decay=0.5))
    good = grpo.place(grpo_test.rollout_of("modern", values))
    values = values.copy()
    values[2] = np.nan
    bad = grpo.place(grpo_test.rollout_of("modern", values))
    new, metrics = step(state, reference, bad)
    assert float(metrics["skipped"]) == 1
    assert int(new.step) == 1
    assert equal((new.params, new.opt_state, new.ema), (state.params, state.opt_state, state.ema))
    new, metrics = step(new, reference, good)
    assert float(metrics["skipped"]) == 0
    assert not equal(new.params, state.params)


def test_spikes_by_hand(monkeypatch):
  """Norms 3, 4, 5, 4 have the mean 4. A norm above 3 x 4 is a spike and does not enter the mean."""
  monkeypatch.setattr(numerics, "SETTLED", 4)
  watch = numerics.watch_norm(3.0)
  state = watch.init(None)

  def see(norm):
    updates = {"w": jnp.float32([0.6 * norm, 0.8 * norm])}
    found, new = watch.update(updates, state)
    assert found is updates
    return new

  for norm in (3, 4, 5, 4):
    state = see(norm)
    assert not state.spike
  assert float(state.mean) == pytest.approx(4)
  assert bool(see(12.1).spike)
  assert not bool(see(11.9).spike)
  assert not numerics.is_sound(jnp.float32(1), jnp.float32(12.1), (see(12.1), optax.EmptyState()))
  assert numerics.is_sound(jnp.float32(1), jnp.float32(11.9), (see(11.9), optax.EmptyState()))
  assert numerics.is_sound(jnp.float32(1), jnp.float32(1e9), optax.EmptyState())
  for value, norm in ((NAN, 1), (INF, 1), (1, NAN), (1, INF)):
    assert not numerics.is_sound(jnp.float32(value), jnp.float32(norm), optax.EmptyState())


@pytest.mark.slow
def test_a_spike_of_a_real_gradient_is_skipped(monkeypatch):
  """After overfitting to one batch, the gradient of another batch is large."""
  monkeypatch.setattr(numerics, "SETTLED", 10)
  optimizer = create_optimizer(
    OptimizerConfig(learning_rate=1e-2, warmup_steps=2, skip_above=2.0), 100
  )
  with jax.set_mesh(mesh_of(1, 1, 1)):
    state = init_state(CONFIG, optimizer, jax.random.key(0))
    step = jax.jit(lambda s, b: train_step(CONFIG, optimizer, 60, 1, s, b))
    same, other = (laid_out(state_test.make_batch(i)) for i in (0, 1))
    for _ in range(60):
      state, metrics = step(state, same)
      assert float(metrics["skipped"]) == 0
    new, metrics = step(state, other)
    mean = float(state.opt_state[0].mean)
    assert float(metrics["grad_norm"]) > 2 * mean
    assert float(metrics["skipped"]) == 1
    assert equal((new.params, new.opt_state), (state.params, state.opt_state))
    new, metrics = step(new, same)
    assert float(metrics["skipped"]) == 0


def test_without_a_threshold_the_state_has_the_layout_of_older_checkpoints():
  params = {"w": jnp.ones(3)}
  watched = create_optimizer(OptimizerConfig(skip_above=5.0), 10).init(params)
  plain = create_optimizer(OptimizerConfig(), 10).init(params)
  assert jax.tree.structure(plain) == jax.tree.structure(watched[1:])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_named_and_not_saved(value):
  tree = {"a": jnp.ones(3), "b": {"c": jnp.float32([1, value])}, "n": jnp.int32(3)}
  assert numerics.not_finite(tree) == ["b.c"]
  with refused(UserError):
    numerics.check_finite(tree, "checkpoint 7", "do it")
  numerics.check_finite({"a": jnp.ones(3)}, "checkpoint 7", "do it")
