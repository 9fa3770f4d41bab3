import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.models import shape_color
from cm3leon_jax.models.transformer import params_from_codebook
from cm3leon_jax.training.step.optimizer import create_optimizer, on_vectors
from tests.models.tiny import CONFIG, mesh_of

# T text tokens, S shapes, C colors, D width.
T, S, C, D = 8, 4, 6, 32
START, COLORS = T, C


def random_parts(seed):
  rng = np.random.default_rng(seed)
  sizes = ((T, D), (S, D), (C, D), (S, C, D))
  return centered(shape_color.Parts(*(rng.normal(size=size).astype(np.float32) for size in sizes)))


def centered(parts):
  """Returns parts with the same sums, in which colors and pairs have mean 0."""
  by_shape = parts.pairs.mean(1, keepdims=True)
  by_color = (parts.pairs - by_shape).mean(0, keepdims=True)
  pairs = parts.pairs - by_shape - by_color
  shapes, colors = parts.shapes + 0.3 * by_shape[:, 0], parts.colors + 0.3 * by_color[0]
  shift = colors.mean(0, keepdims=True)
  return parts._replace(shapes=shapes + shift, colors=colors - shift, pairs=pairs)


def parts_of(tree):
  return shape_color.Parts(*(tree[f"embed_{name}"] for name in shape_color.Parts._fields))


def test_a_table_in_literals():
  parts = shape_color.Parts(
    jnp.ones((1, 1)),
    jnp.array([[10.0], [20.0]]),
    jnp.array([[-1.0], [0], [1.0]]),
    jnp.array([[[10.0], [0], [-10.0]], [[-10.0], [0], [10.0]]]),
  )
  table = jnp.array([[1.0], [12.0], [10.0], [8.0], [16.0], [20.0], [24.0]])
  np.testing.assert_allclose(jax.jit(shape_color.join)(parts), table, rtol=1e-6)
  split = jax.jit(shape_color.split, static_argnums=(1, 2))
  for found, part in zip(split(table, 1, 3), parts):
    np.testing.assert_allclose(found, part, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2)])
def test_join_inverts_split_on_any_mesh(shape):
  parts = random_parts(0)
  with jax.set_mesh(mesh_of(*shape)):
    table = jax.jit(shape_color.join)(parts)
    found = jax.jit(lambda x: shape_color.split(x, START, COLORS))(table)
  for a, b in zip(found, parts):
    np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize(("name", "shape"), [("adamw", (1, 1, 1)), ("muon", (1, 4, 2))])
def test_updates_are_those_of_a_model_whose_parameters_are_the_vectors(name, shape):
  """The oracle trains the vectors with the plain optimizer; its gradients come from autodiff."""
  config = OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=0, weight_decay=0.1)
  plain = create_optimizer(config, 10)
  parts, target = random_parts(1), np.random.default_rng(2).normal(size=(T + S * C, D))

  def loss(table):
    return jnp.sum(jnp.tanh(table - target) ** 2)

  def tree_of(parts):
    return {f"embed_{k}": x for k, x in parts._asdict().items()}

  @jax.jit
  def oracle_step(parts, state):
    tree = tree_of(parts)
    grads = jax.grad(lambda p: loss(shape_color.join(parts_of(p))))(tree)
    updates, state = plain.update(grads, state, tree)
    return centered(parts_of(optax.apply_updates(tree, updates))), state

  with jax.set_mesh(mesh_of(*shape)):
    tied = on_vectors(plain, START, COLORS)
    params = {"embed": jax.jit(shape_color.join)(parts)}
    oracle = parts
    states = jax.jit(tied.init)(params), jax.jit(plain.init)(tree_of(oracle))

    def updates_of(optimizer, params, state):
      return optimizer.update(jax.grad(lambda p: loss(p["embed"]))(params), state, params)

    @jax.jit
    def step(params, state):
      updates, state = updates_of(tied, params, state)
      return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, static_argnums=0)
    def first_updates(optimizer, params, state):
      return updates_of(optimizer, params, state)[0]["embed"]

    for _ in range(4):
      params, state = step(params, states[0])
      oracle, other = oracle_step(oracle, states[1])
      states = state, other
    np.testing.assert_allclose(params["embed"], jax.jit(shape_color.join)(oracle), atol=2e-5)
    # Negative control: the plain optimizer moves rows one by one.
    free, vectors = (first_updates(x, params, jax.jit(x.init)(params)) for x in (plain, tied))
    assert np.abs(np.asarray(free) - np.asarray(vectors)).max() > 1e-3


@pytest.mark.parametrize("with_pairs", [True, False])
def test_two_pairs_are_preferred_without_their_mixtures(with_pairs):
  """The output for a red paw or a blue key must not also be a blue paw. Sums alone reach 1/2."""
  target = np.zeros((S, C))
  target[0, 0] = target[1, 1] = 0.5
  parts = random_parts(3)._replace(pairs=np.zeros((S, C, D), np.float32))

  @jax.jit
  def log_probs(parts):
    return jax.nn.log_softmax((shape_color.join(parts) @ (jnp.ones(D) / D))[T:])

  def loss(parts):
    return -jnp.sum(target.ravel() * log_probs(parts))

  @jax.jit
  def step(parts):
    change = jax.grad(loss)(parts)
    if not with_pairs:
      change = change._replace(pairs=jnp.zeros((S, C, D)))
    return jax.tree.map(lambda x, dx: x - 20 * dx, parts, change)

  for _ in range(400):
    parts = step(parts)
  found = np.exp(log_probs(parts)).reshape(S, C)
  correct = float(found[0, 0] + found[1, 1])
  assert correct > 0.95 if with_pairs else correct < 0.51


def test_the_start_is_a_sum_with_the_variance_of_other_codes():
  rng, key = np.random.default_rng(0), jax.random.key(0)
  size = dataclasses.replace(CONFIG, vocab_size=T + 40 * C, width=64, family="modern")
  start = dataclasses.replace(
    size, codebook_start=0.5, tied_start=True, embed_std=0.1, init_std=0.02
  )
  shapes, colors = rng.normal(size=(40, 5)), rng.normal(size=(C, 3))
  codebook = np.concatenate([np.repeat(shapes, C, 0), np.tile(colors, (40, 1))], 1)

  @jax.jit
  def from_codebook(key):
    configs = (dataclasses.replace(start, code_colors=n) for n in (0, C))
    return [params_from_codebook(config, T, codebook, key) for config in configs]

  with jax.set_mesh(mesh_of(1, 1, 1)):
    tables = jax.device_get(from_codebook(key))
  for name, std in (("embed", 0.1), ("head", 0.02)):
    free, tied = (np.asarray(table[name])[T:].reshape(40, C, 64) for table in tables)
    sums = tied.mean(1, keepdims=True) + tied.mean(0) - tied.mean((0, 1))
    np.testing.assert_allclose(tied, sums, atol=1e-6)
    assert (
      np.abs(free - free.mean(1, keepdims=True) - free.mean(0) + free.mean((0, 1))).max() > 0.01
    )
    assert tied.std() == pytest.approx(std, rel=0.2)
