import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.training.step.optimizer import (
  create_optimizer,
  learning_rate_schedule,
)


def jitted(config, steps=10):
  """Returns an optimizer whose functions are one program each."""
  return optax.GradientTransformation(*map(jax.jit, create_optimizer(config, steps)))


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55)])
def test_schedule_literals(schedule, middle):
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule=schedule)
  rate = jax.jit(learning_rate_schedule(config, 110))
  assert [float(rate(s)) for s in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
  assert float(rate(60)) == pytest.approx(middle)
  assert float(rate(110)) == pytest.approx(0.1)


def test_the_rate_of_wsd_stays_at_its_peak_and_falls_over_the_last_steps():
  config = OptimizerConfig(
    learning_rate=1.0, warmup_steps=10, schedule="wsd", final_fraction=0.0, decay_fraction=0.25
  )
  rate = learning_rate_schedule(config, 200)
  steps = (0, 5, 10, 100, 150, 175, 200)
  assert [float(rate(s)) for s in steps] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_warm_up_takes_at_most_half_of_a_short_run():
  rate = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=1_500), 20)
  assert float(rate(10)) == pytest.approx(1.0)


def adamw_by_hand(gradients, decay_mask):
  """Computes AdamW (Loshchilov & Hutter 2019, algorithm 2) in float64, after clipping as in OPT.

  Args:
    gradients: gradients of each step, [steps, n].
    decay_mask: [n], 1 where weights decay.

  Returns:
    Updates [steps, n] at learning rate 1, if the parameters are 2 in every step.
  """
  b1, b2, eps, decay, clip = 0.9, 0.95, 1e-8, 0.1, 1.0
  m = v = np.zeros(gradients.shape[1])
  updates = []
  for t, g in enumerate(gradients.astype(np.float64), 1):
    g = g * min(1.0, clip / np.linalg.norm(g))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    scaled = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    updates.append(-(scaled + decay * 2.0 * decay_mask))
  return np.array(updates)


def test_the_default_updates_are_those_of_adamw_by_hand():
  """Covers gradient norms below and far above the clipping norm, and elements of only 1e-5."""
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, final_fraction=1.0)
  optimizer = jitted(config, 100)
  gradients = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
  gradients *= np.array([0.1, 30, 1e-5, 5, 0.01, 0.3], np.float32)[:, None]
  gradients[:, :2] *= 1e-4
  params = dict.fromkeys(("scale", "weight"), np.full(4, 2.0, np.float32))
  state, found = optimizer.init(params), []
  for g in gradients:
    updates, state = optimizer.update({"scale": g[:4], "weight": g[4:]}, state, params)
    found.append(np.concatenate([updates["scale"], updates["weight"]]))
  expected = adamw_by_hand(gradients, np.repeat([0, 1], 4))
  np.testing.assert_allclose(np.array(found), expected, rtol=2e-4, atol=1e-6)
  assert np.linalg.norm(gradients, axis=1).max() > 10


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_spares_scales_and_biases_of_norms(name):
  fields = {"name": name, "learning_rate": 1.0, "warmup_steps": 0, "weight_decay": 0.5}
  optimizer = jitted(OptimizerConfig(**fields))
  norm = {"scale": jnp.ones(3), "bias": jnp.ones((2, 3))}
  params = {"norm": norm, "up": jnp.ones((3, 3)), "embed": jnp.ones(3)}
  zeros = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  jax.tree.map(lambda found: np.testing.assert_allclose(found, 0), updates["norm"])
  for found in (updates["up"], updates["embed"]):
    np.testing.assert_allclose(found, -0.5)


def test_decay_may_spare_the_tables_of_tokens_and_positions():
  config = OptimizerConfig(
    learning_rate=1.0, warmup_steps=0, weight_decay=0.5, decay_embeddings=False
  )
  optimizer, params = jitted(config), dict.fromkeys(("embed", "positions", "head"), jnp.ones(3))
  updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
  for name, change in (("embed", 0), ("positions", 0), ("head", -0.5)):
    np.testing.assert_allclose(updates[name], change)


def test_the_first_moment_may_be_kept_in_bfloat16():
  params = {"embed": jnp.ones(3)}
  step = {}
  for dtype in ("float32", "bfloat16"):
    optimizer = jitted(OptimizerConfig(first_moment_dtype=dtype, warmup_steps=0, clip_norm=1e9))
    state = optimizer.init(params)
    assert state[1][0].mu["embed"].dtype == dtype
    assert state[1][0].nu["embed"].dtype == jnp.float32
    for gradient in (0.3, 0.111):
      updates, state = optimizer.update({"embed": jnp.full(3, gradient)}, state, params)
    step[dtype] = np.asarray(updates["embed"])
  np.testing.assert_allclose(step["bfloat16"], step["float32"], rtol=2**-8)
  assert np.any(step["bfloat16"] != step["float32"])


def test_muon_makes_the_updates_of_matrices_orthogonal_and_of_the_size_of_adamw():
  """Muon updates the matrices of each layer, with heads concatenated; AdamW updates the rest."""
  rng = np.random.default_rng(0)
  shapes = {"qkv": (2, 3, 8, 2, 3), "out": (2, 2, 3, 8), "up": (2, 8, 12), "embed": (5, 8)}
  shapes |= {"q": (2, 8, 4, 3), "kv": (2, 2, 8, 2, 3)}
  gradients = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
  optimizer = jitted(
    OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
  )
  params = jax.tree.map(np.zeros_like, gradients)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  matrices = {
    "qkv": (6, 8, 6),
    "out": (2, 6, 8),
    "up": (2, 8, 12),
    "q": (2, 8, 12),
    "kv": (4, 8, 6),
  }
  for name, shape in matrices.items():
    # Five iterations bring the singular values of a full-rank matrix near 1 (Jordan et al. 2024).
    values = np.linalg.svd(np.asarray(updates[name]).reshape(shape), compute_uv=False)
    assert np.all(np.abs(values / (0.2 * max(shape[1:]) ** 0.5) - 1) < 0.35), name
    assert np.vdot(updates[name], gradients[name]) < 0
    raw = np.linalg.svd(np.asarray(gradients[name]).reshape(shape), compute_uv=False)
    assert raw.max() / raw.min() > 3  # The gradients themselves are far from orthogonal.
  embed = updates["embed"] * -np.sign(gradients["embed"])
  # Adam's first updates all have the same size.
  np.testing.assert_allclose(embed, embed[0, 0], rtol=1e-3)
