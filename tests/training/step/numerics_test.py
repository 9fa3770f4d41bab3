import jax
import numpy as np
import optax
import pytest

from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.training.step import numerics
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import init_state, train_step
from tests.models.tiny import CONFIG, mesh_of, place
from tests.refusals import refused
from tests.training.step import state_test

NAN, INF = float("nan"), float("inf")


def laid_out(batch):
  return {name: place(x, "batch", "length") for name, x in batch.items()}


def poisoned(seed, value):
  batch = state_test.make_batch(seed)
  batch["loss_weights"][3, 5] = value
  return batch


def equal(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)


def test_a_poisoned_batch_leaves_no_trace():
  """After a bad batch, the run continues bit for bit as if the batch did not exist."""
  optimizer = create_optimizer(
    OptimizerConfig(learning_rate=1e-2, warmup_steps=2, skip_above=9.0), 10
  )
  with jax.set_mesh(mesh_of(2, 2, 2)):
    init = jax.jit(lambda: init_state(CONFIG, optimizer, jax.random.key(0), averaged=True))
    step = jax.jit(
      lambda s, b: train_step(CONFIG, optimizer, 60, 2, s, b, ema_decay=0.01),
      donate_argnums=0,
    )

    def run(batches):
      state, skipped = init(), []
      for batch in batches:
        state, metrics = step(state, laid_out(batch))
        skipped.append(float(metrics["skipped"]))
      return state, skipped

    good = [state_test.make_batch(i) for i in range(3)]
    state, skipped = run([good[0], poisoned(7, INF), good[1], good[2]])
    expected, none = run(good)
    assert (skipped, none) == ([0, 1, 0, 0], [0, 0, 0])
    assert (int(state.step), int(expected.step)) == (4, 3)
    found = (state.params, state.opt_state, state.ema)
    assert equal(found, (expected.params, expected.opt_state, expected.ema))
    for x, first in zip(jax.tree.leaves(state), jax.tree.leaves(init()), strict=True):
      assert x.sharding.is_equivalent_to(first.sharding, x.ndim)


def test_spikes_by_hand(monkeypatch):
  """Norms 3, 4, 5, 4 have the mean 4. A norm above 3 x 4 is a spike and does not enter the mean."""
  monkeypatch.setattr(numerics, "SETTLED", 4)
  watch = numerics.watch_norm(3.0)
  update, is_sound = jax.jit(watch.update), jax.jit(numerics.is_sound)
  state = watch.init(None)

  def see(norm):
    updates = {"w": np.float32([0.6 * norm, 0.8 * norm])}
    found, new = update(updates, state)
    np.testing.assert_array_equal(found["w"], updates["w"])
    return new

  for norm in (3, 4, 5, 4):
    state = see(norm)
    assert not state.spike
  assert float(state.mean) == pytest.approx(4)
  assert bool(see(12.1).spike)
  assert not bool(see(11.9).spike)
  assert not is_sound(np.float32(1), np.float32(12.1), (see(12.1), optax.EmptyState()))
  assert is_sound(np.float32(1), np.float32(11.9), (see(11.9), optax.EmptyState()))
  assert is_sound(np.float32(1), np.float32(1e9), optax.EmptyState())
  for value, norm in ((NAN, 1), (INF, 1), (1, NAN), (1, INF)):
    assert not is_sound(np.float32(value), np.float32(norm), optax.EmptyState())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_named_and_not_saved(value):
  tree = {"a": np.ones(3), "b": {"c": np.float32([1, value])}, "n": np.int32(3)}
  assert numerics.not_finite(tree) == ["b.c"]
  with refused(UserError, "checkpoint 7", "b.c", "do it"):
    numerics.check_finite(tree, "checkpoint 7", "do it")
  numerics.check_finite({"a": np.ones(3)}, "checkpoint 7", "do it")
