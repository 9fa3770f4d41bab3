"""Compares train steps on an accelerator with the same steps on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.training import OptimizerConfig, TrainConfig
from cm3leon_jax.data.rows.loader import rows_of_samples
from cm3leon_jax.mesh import MeshConfig, create_mesh, shard, shardings
from cm3leon_jax.training.steps import compile_steps
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights.checkpoint import Checkpoints
from tests.device.devices import cpu_mesh, device_mesh, error, on_host

pytestmark = [pytest.mark.gpu, pytest.mark.tpu]

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=248)
LENGTH, ROWS, STEPS = 128, 4, 20
SIZES = {"num_layers": 2, "width": 128, "num_heads": 2, "mlp_width": 256, "loss_chunk": 64}


def model_config(family="opt", dtype="float32"):
  return ModelConfig(
    family, vocab_size=VOCAB.size, max_positions=LENGTH, dtype=dtype, remat_policy="none", **SIZES
  )


@functools.cache
def steps_on(mesh, family="opt", dtype="float32"):
  with jax.set_mesh(mesh):
    config = TrainConfig(steps=STEPS, global_batch_size=ROWS)
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
    return compile_steps(model_config(family, dtype), optimizer, config, VOCAB, seed=0)


def batch_of(seed):
  """Returns rows of random tokens, in which a token repeats with a period of 16."""
  rng = np.random.default_rng(seed)
  samples = [
    np.tile(rng.integers(8, VOCAB.size, 16), LENGTH // 16 + 1)[: LENGTH + 1].astype(np.int32)
    for _ in range(ROWS)
  ]
  rows = rows_of_samples(samples, LENGTH, VOCAB)
  return {name: shard(jnp.asarray(x), "batch", "length") for name, x in rows.items()}


def first_state(mesh, family="opt", dtype="float32"):
  """Returns the state that the CPU initializes, on the device of `mesh`."""
  with jax.set_mesh(cpu_mesh()):
    state = on_host(steps_on(cpu_mesh(), family, dtype).init())
  with jax.set_mesh(mesh):
    types = jax.eval_shape(steps_on(mesh, family, dtype).init)
    return jax.device_put(state, shardings(types, mesh))


def trained(mesh, steps, family="opt", dtype="float32"):
  """Trains for `steps` steps from the same state; returns the losses and the state."""
  state, losses = first_state(mesh, family, dtype), []
  with jax.set_mesh(mesh):
    for seed in range(steps):
      state, metrics = steps_on(mesh, family, dtype).train(state, batch_of(seed % 4))
      losses.append(float(metrics["loss"]))
  return np.array(losses), state


def gradients(mesh, family, seed=0):
  """Takes a step; returns loss, gradient norm, and Adam's moments, which contain the gradient."""
  with jax.set_mesh(mesh):
    state = first_state(mesh, family)
    state, metrics = steps_on(mesh, family).train(state, batch_of(seed))
  moments = [x for x in jax.tree.leaves(on_host(state.opt_state)) if x.ndim]
  return float(metrics["loss"]), float(metrics["grad_norm"]), moments


@pytest.mark.parametrize("family", ["opt", "modern"])
def test_loss_and_gradient_equal_those_of_the_cpu(family):
  """As a control, the gradient of another batch is far away."""
  loss, norm, moments = gradients(device_mesh(), family)
  expected_loss, expected_norm, expected = gradients(cpu_mesh(), family)
  assert loss == pytest.approx(expected_loss, rel=1e-5)
  assert norm == pytest.approx(expected_norm, rel=1e-4)
  assert error(moments, expected) < 1e-3
  assert error(gradients(cpu_mesh(), family, seed=1)[2], expected) > 0.1


def test_losses_of_20_steps_equal_those_of_the_cpu_and_fall():
  found, expected = (trained(mesh, STEPS)[0] for mesh in (device_mesh(), cpu_mesh()))
  np.testing.assert_allclose(found, expected, rtol=5e-3)
  assert expected[-4:].mean() < expected[:4].mean() - 0.3


def test_the_loss_in_bfloat16_is_near_that_in_fp32():
  found, expected = (trained(device_mesh(), STEPS, dtype=d)[0] for d in ("bfloat16", "float32"))
  np.testing.assert_allclose(found, expected, rtol=0.02)
  assert np.abs(found - expected).max() > 1e-5  # Control: the dtypes differ.


def test_two_trainings_are_bitwise_equal():
  """If this fails, kills and checked steps cannot be compared bit for bit on this device."""
  states = [on_host(trained(device_mesh(), 5)[1]) for _ in range(2)]
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_checked_step_equals_a_step_and_finds_a_changed_bit(on_device):
  mesh = device_mesh()
  expected = on_host(steps_on(mesh).train(first_state(mesh), batch_of(0))[0])
  runs = []
  for changed in (False, False, True):
    state = first_state(mesh)
    if changed:
      embed = np.array(state.params["embed"])
      embed[7, 7] = np.nextafter(embed[7, 7], np.float32(1))
      state.params["embed"] = jax.device_put(embed, state.params["embed"].sharding)
    runs.append(steps_on(mesh).checked(state, batch_of(0)))
  jax.tree.map(np.testing.assert_array_equal, on_host(runs[0][0]), expected)
  prints = [jax.device_get(run[2]["read"]) for run in runs]
  np.testing.assert_array_equal(prints[0], prints[1])
  assert (prints[0] != prints[2]).any()


def test_a_step_reuses_the_memory_of_the_state(on_device):
  mesh = device_mesh()
  state, batch = first_state(mesh), batch_of(0)
  held = sum(x.nbytes for x in jax.tree.leaves(state))
  aliased = steps_on(mesh).train.lower(state, batch).compile().memory_analysis()
  assert aliased.alias_size_in_bytes >= held
  steps_on(mesh).train(state, batch)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_a_restored_state_takes_the_same_next_step(tmp_path, on_device):
  mesh = device_mesh()
  _, state = trained(mesh, 2)
  with Checkpoints(tmp_path, 2) as checkpoints:
    checkpoints.save(state, 2, 2 * ROWS)
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.eval_shape(steps_on(mesh).init), 2)
  jax.tree.map(np.testing.assert_array_equal, on_host(restored), on_host(state))
  one, two = (on_host(steps_on(mesh).train(s, batch_of(2))[0]) for s in (state, restored))
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_all_devices_together_compute_the_step_of_one():
  """Splits rows and parameters over all devices. With one device, this compares equal programs."""
  count = max(n for n in (1, 2, 4) if n <= jax.device_count())
  mesh = create_mesh(MeshConfig(), jax.devices()[:count])
  found, expected = trained(mesh, 3)[0], trained(device_mesh(), 3)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-4)
