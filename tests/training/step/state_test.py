import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.configs import cm3leon_7b
from cm3leon_jax.mesh import spec
from cm3leon_jax.models import transformer
from cm3leon_jax.training.step.loss import SOURCE_SUMS
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState, init_state, train_step
from tests.models.tiny import CONFIG, mesh_of, model_logits, place, random_params

OPTIMIZER = create_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=2), 10)
MUON = create_optimizer(OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=2), 10)
B, L, S = 8, 16, 5  # S is the number of sources; the last has no targets.


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  # Micro-batches have different sums of weights.
  weights = rng.random((B, L)).astype(np.float32) * (rng.random((B, 1)) > 0.4)
  batch = {name: rng.integers(0, 96, (B, L)).astype(np.int32) for name in ("inputs", "targets")}
  batch["loss_weights"] = weights.astype(np.float32)
  positions = np.tile(np.arange(L, dtype=np.int32), (B, 1))
  return {**batch, "segment_ids": np.ones((B, L), np.int32), "positions": positions}


def marked_batch(seed=0):
  """Returns a batch with a source number for each token; sources count from 1."""
  sources = np.random.default_rng(seed).integers(0, S, (B, L)).astype(np.int32)
  return {**make_batch(seed), "sources": sources}


def run(shape, accumulation, steps=3, z_loss=0.0, optimizer=OPTIMIZER, **fields):
  """Trains; returns losses and gradient norms [T, 4], the state, and step 1's sums by source."""
  config = dataclasses.replace(CONFIG, **fields)
  with jax.set_mesh(mesh_of(*shape)):
    state = jax.jit(functools.partial(init_state, config, optimizer))(jax.random.key(0))
    options = {"z_loss": z_loss, "num_sources": S}
    step = jax.jit(functools.partial(train_step, config, optimizer, 60, accumulation, **options))
    losses, sums = [], None
    for i in range(steps):
      batch = {n: place(x, "batch", "length") for n, x in marked_batch(i).items()}
      state, metrics = step(state, batch)
      sums = jax.device_get([metrics[name] for name in SOURCE_SUMS]) if sums is None else sums
      losses.append(
        [float(metrics[name]) for name in ("loss", "image_loss", "text_loss", "grad_norm")]
      )
    return np.array(losses), jax.device_get(state), np.array(sums)


@pytest.fixture(scope="module")
def reference():
  return run((1, 1, 1), 1)


def test_loss_and_gradient_are_those_of_a_weighted_mean(reference):
  """Compares with jax.grad of all logits. Updates would not show a wrong scale of the gradient."""
  batch = make_batch(0)
  weights, targets = batch["loss_weights"], batch["targets"]

  def mean_nll(params):
    logits = model_logits(CONFIG, params, batch["inputs"], batch["positions"], batch["segment_ids"])
    log_probs = jax.nn.log_softmax(logits)
    nll = -jnp.sum(log_probs * jax.nn.one_hot(targets, CONFIG.vocab_size), -1)
    return jnp.sum(weights * nll) / jnp.sum(weights)

  @jax.jit
  def value_and_norm(params):
    value, gradient = jax.value_and_grad(mean_nll)(params)
    return value, optax.tree.norm(gradient)

  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = jax.jit(functools.partial(transformer.init_params, CONFIG))(jax.random.key(0))
    value, norm = value_and_norm(params)
  np.testing.assert_allclose(reference[0][0, [0, 3]], [value, norm], rtol=1e-5)


def test_mesh_and_accumulation_change_nothing(reference):
  losses, state, sums = run((2, 2, 2), 2)
  np.testing.assert_allclose(losses, reference[0], rtol=2e-5)
  (nll, weights), (expected_nll, expected_weights) = sums, reference[2]
  np.testing.assert_allclose(nll, expected_nll, rtol=2e-5)
  np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference[1].params)):
    np.testing.assert_allclose(a, b, atol=2e-4)
  assert losses[2, 0] != losses[0, 0]


@pytest.mark.slow
def test_a_mesh_changes_nothing_of_muon(reference):
  """On a mesh, Muon's matrices are sharded, and the results are equal."""
  losses, state, _ = run((1, 1, 1), 1, optimizer=MUON)
  split, split_state, _ = run((2, 2, 2), 1, optimizer=MUON)
  np.testing.assert_allclose(split, losses, rtol=2e-5)
  for a, b in zip(jax.tree.leaves(split_state.params), jax.tree.leaves(state.params)):
    np.testing.assert_allclose(a, b, atol=2e-4)
  assert abs(losses[2, 0] - reference[0][2, 0]) > 1e-3


def test_the_average_on_a_mesh_is_the_recursion_of_the_parameters():
  """The step donates its state. Decays are 1/10, 2/11, 3/12 and then 0.3."""

  def recursion(decay, average, params):
    return jax.tree.map(lambda x, new: decay * x + (1 - decay) * new, average, params)

  with jax.set_mesh(mesh_of(2, 2, 2)):
    state = jax.jit(lambda: init_state(CONFIG, OPTIMIZER, jax.random.key(0), averaged=True))()
    step = jax.jit(
      lambda s, b: train_step(CONFIG, OPTIMIZER, 60, 1, s, b, ema_decay=0.3), donate_argnums=0
    )
    expected = jax.tree.map(np.float64, jax.device_get(state.params))
    for i, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
      batch = {name: place(x, "batch", "length") for name, x in make_batch(i).items()}
      state, _ = step(state, batch)
      expected = recursion(decay, expected, jax.device_get(state.params))
  leaves = zip(*map(jax.tree.leaves, (state.ema, expected, state.params)))
  for found, average, param in leaves:
    np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-7)
    assert np.abs(found - param).max() > 1e-4
    assert (found.dtype, found.sharding) == (param.dtype, param.sharding)


COMMON, COPIES = 7, 770  # Rows 96 to 96 + COPIES - 1 of the table are copies of row COMMON.


def bfloat16_gradient(shape):
  """Returns (function from batch to gradient, batch in which COMMON occurs COPIES times).

  The function runs a train step whose optimizer only stores the gradient.
  """
  config = dataclasses.replace(
    CONFIG, vocab_size=896, num_layers=1, max_positions=128, dtype="bfloat16"
  )
  keep = optax.trace(0.0)  # This optimizer's state is the gradient.
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 96, (2, 8, 128)).astype(np.int32)
  ids[0][ids[0] == COMMON] = COMMON + 1
  ids[0].flat[rng.permutation(ids[0].size)[:COPIES]] = COMMON
  ones = np.ones((8, 128), np.int32)
  batch = {"inputs": ids[0], "targets": ids[1], "loss_weights": ones.astype(np.float32)}
  batch |= {"segment_ids": ones, "positions": np.tile(np.arange(128, dtype=np.int32), (8, 1))}
  mesh = mesh_of(*shape)
  with jax.set_mesh(mesh):
    params = random_params(config)
    rows = np.array(params["embed"])
    rows[96 : 96 + COPIES] = rows[COMMON]
    params["embed"] = place(rows, "vocab_stored", None)
    state = TrainState(jnp.zeros((), jnp.int32), params, keep.init(params))
    step = jax.jit(lambda s, b: train_step(config, keep, 60, 1, s, b)[0].opt_state.trace)

  def gradient(batch):
    with jax.set_mesh(mesh):
      laid_out = {name: place(x, "batch", "length") for name, x in batch.items()}
      return jax.tree.map(
        lambda x: np.asarray(x, np.float64), jax.device_get(step(state, laid_out))
      )

  return gradient, batch


def test_the_gradient_of_a_frequent_token_is_summed_in_fp32():
  """Compares with the sum of gradients of a step that reads each copy of the row only once.

  A copy also gets a gradient from the tied output table, which is subtracted: it is the copy's
  gradient in the step that reads no copies.
  """
  gradient, batch = bfloat16_gradient((2, 2, 1, 2))
  found = gradient(batch)
  copies = batch["inputs"].copy()
  copies[copies == COMMON] = 96 + np.arange(COPIES)
  apart = gradient({**batch, "inputs": copies})["embed"]
  rows = slice(96, 96 + COPIES)
  expected = apart[COMMON] + (apart[rows] - found["embed"][rows]).sum(0)
  error = np.linalg.norm(found["embed"][COMMON] - expected) / np.linalg.norm(expected)
  # Sums in bfloat16 would have an error of 0.1 on one device, and 0.005 on eight.
  assert error < 2e-5
  halved = gradient({**batch, "loss_weights": batch["loss_weights"] / 2})
  for a, b in zip(jax.tree.leaves(halved), jax.tree.leaves(found)):
    np.testing.assert_array_equal(a, b, "only ratios of loss weights matter")


def array_shapes(jaxpr):
  """Returns all array shapes in a jaxpr; types are like f32[8@fsdp,64512@(tensor,fsdp)]."""
  text = re.sub(r"@\([\w,]+\)|@\w+", "", str(jaxpr))
  return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[(\d[\d,]*)", text)}


def abstract_7b(shape):
  """Traces the 7B train step on 8 devices without arrays; returns settings, state and jaxpr."""
  config = settings_from_config(cm3leon_7b.get_config())
  model, optimizer = config.model, create_optimizer(config.optimizer, 10)
  with jax.set_mesh(mesh_of(*shape)):
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    length = config.data.sequence_length
    types = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), "int32")
    types["loss_weights"] = "float32"
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch", "length"))
    batch = {
      name: jax.ShapeDtypeStruct((B, length), dtype, sharding=sharding)
      for name, dtype in types.items()
    }
    step = functools.partial(train_step, model, optimizer, config.vocab.text_size, 1)
    return config, state, jax.make_jaxpr(step)(state, batch)


def test_the_7b_step_splits_the_vocabulary_and_never_holds_all_logits():
  shape = (2, 2, 2)
  config, state, jaxpr = abstract_7b(shape)
  V, L = config.model.vocab_size, config.data.sequence_length
  assert (V, L) == (64_512, 4_096)
  adam = state.opt_state[1][0]
  for table in (state.params["embed"], adam.mu["embed"], adam.nu["embed"]):
    assert table.shape == (V, config.model.width)
    assert table.sharding.spec == spec("vocab_stored", None)
    assert table.sharding.shard_shape(table.shape)[0] == V // (shape[1] * shape[2])
  # Part of the vocabulary that one device of the axis `tensor` has during the loss.
  rows = V // shape[2]
  D = config.model.width  # D equals L here, but tables and their gradients are not logits.
  tables = {(V, D), (rows, D), (D, rows)}
  with_vocab = {s for s in array_shapes(jaxpr) if {V, rows} & set(s)} - tables
  assert with_vocab
  assert not [s for s in with_vocab if L in s], "an array has full vocabulary x full sequence"
  # Chunks are 1/16 of a device's logits.
  tokens = B // (shape[0] * shape[1]) * ModelConfig().loss_chunk
  assert max(int(np.prod(s)) // rows for s in with_vocab) == tokens


def test_a_step_without_chunks_would_be_found():
  """Negative control: with one chunk per row, the step has an array of vocabulary x sequence."""
  config = dataclasses.replace(CONFIG, loss_chunk=L)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    state = jax.eval_shape(lambda: init_state(config, OPTIMIZER, jax.random.key(0)))
    batch = {name: place(x, "batch", "length") for name, x in make_batch().items()}
    jaxpr = jax.make_jaxpr(lambda s, b: train_step(config, OPTIMIZER, 60, 1, s, b))(state, batch)
  assert [s for s in array_shapes(jaxpr) if 96 in s and L in s]
