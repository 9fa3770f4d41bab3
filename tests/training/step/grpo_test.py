import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.positions import positions_of
from cm3leon_jax.training.step import grpo
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.vocab import VocabLayout
from tests.models.tiny import mesh_of, model_logits, random_params

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=32)
IMAGE = 6  # Number of codes per image.
SAMPLING = SamplingConfig(guidance=1.5, top_k=0, top_p=1.0)
WEIGHTS = np.float32([1.5, -0.5])
PROMPTS = [[20, 21, 22], [30], [20, 23], [24, 25, 26, 27, 28]]


def model_config(family):
  return ModelConfig(
    family=family, vocab_size=VOCAB.size, num_layers=2, width=32, num_heads=4, mlp_width=64,
    max_positions=64, dtype="float32", remat_policy="none", align_images=family == "modern",
  )  # fmt: skip


@functools.cache
def sampled(family):
  """Generates two samples per prompt; returns codes [8, I] and their log-probabilities."""
  model = model_config(family)
  requests = requests_of_prompts()
  with jax.set_mesh(mesh_of(1, 1, 1)):
    config = GeneratorConfig(model, VOCAB, IMAGE, 64, SAMPLING)
    results = Generator(random_params(model), config).generate(requests, range(4), samples=2)
  codes = np.stack([result.codes(VOCAB) for result in results])
  return codes, np.stack([result.log_probs[:IMAGE] for result in results])


def requests_of_prompts():
  return [request_lib.text_to_image(VOCAB, IMAGE, caption) for caption in PROMPTS]


def streams_of(family, codes):
  """Returns (ids, positions) of both streams of the samples [8, I], two per prompt."""
  model, requests, rows = model_config(family), requests_of_prompts(), []
  for i, sample in enumerate(codes):
    ids = [np.concatenate([p, VOCAB.image_ids(sample)]) for p in requests[i // 2].streams]
    rows.append([(x, positions_of(x, VOCAB, model.align_images)) for x in ids])
  return rows


def rollout_of(family, values=None, codes=None, order=(0, 1), weights=WEIGHTS):
  """Returns a rollout of two images per prompt, whose codes are random by default.

  `order` are the streams of a row, and `weights` their guidance weights.
  """
  if codes is None:
    codes = np.random.default_rng(0).integers(0, VOCAB.image_size, (8, IMAGE), np.int32)
  rows = [[row[stream] for stream in order] for row in streams_of(family, codes)]
  values = np.ones(8, np.float32) if values is None else values
  guidance = np.tile(np.float32(weights), (8, IMAGE, 1))
  return grpo.Rollout(*grpo.pack_rows(rows, IMAGE, VOCAB.pad), codes, guidance, values)


def log_probs(family, shape, rollout, temperature=1.0):
  model = model_config(family)
  with jax.set_mesh(mesh_of(*shape)):
    compute = jax.jit(grpo.guided_log_probs, static_argnums=(0, 1, 2))
    settings = model, VOCAB.text_size, temperature
    return np.asarray(compute(*settings, random_params(model), grpo.place(rollout)))


def chosen(found, codes):
  return np.take_along_axis(found, codes[..., None], -1)[..., 0]


@pytest.mark.parametrize(("family", "shape"), [("opt", (2, 2, 2)), ("modern", (1, 1, 1))])
def test_log_probs_are_those_of_the_decoder(family, shape):
  codes, expected = sampled(family)
  rollout = rollout_of(family, codes=codes)
  found = chosen(log_probs(family, shape, rollout), codes)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  # Negative control: log-probabilities without guidance differ.
  plain = rollout._replace(guidance=np.tile(np.float32([1, 0]), (8, IMAGE, 1)))
  assert np.abs(chosen(log_probs(family, shape, plain), codes) - expected).max() > 0.05


def test_a_stream_of_weight_0_changes_nothing():
  more = rollout_of("opt", order=(0, 1, 0), weights=(*WEIGHTS, 0))
  np.testing.assert_allclose(
    log_probs("opt", (1, 1, 1), more), log_probs("opt", (1, 1, 1), rollout_of("opt")), atol=1e-5
  )


def test_advantages_are_rewards_minus_the_mean_of_their_group():
  rewards = np.array([[0, 1], [1, 1], [0.1, 0.1]])
  np.testing.assert_allclose(grpo.advantages(rewards), [[-0.5, 0.5], [0, 0], [0, 0]])
  # A rare success has the same scale as rewards of equal frequency: no deviation divides.
  np.testing.assert_allclose(grpo.advantages(np.array([[0.0, 0, 0, 1]])), [[-0.25] * 3 + [0.75]])


def test_a_row_has_the_prompts_of_its_streams_and_then_their_codes():
  first = [(np.array([1, 2, 3, 91, 92]), np.arange(-3, 2)), (np.array([4, 91, 92]), np.arange(3))]
  second = [(np.arange(36), np.arange(36)), (np.arange(50, 53), np.arange(3))]
  inputs, positions, segment_ids = grpo.pack_rows([first, second], 2, 7)
  assert inputs.shape == (2, 64)
  assert inputs[0, -7:].tolist() == [7, 1, 2, 3, 91, 4, 91]
  assert positions[0, -7:].tolist() == [0, -3, -2, -1, 0, 0, 1]
  assert segment_ids[0, -7:].tolist() == [0, 1, 1, 1, 1, 2, 2]
  assert inputs[1, -37:].tolist() == [*range(35), 50, 51]
  assert [(segment_ids[1] == segment).sum() for segment in (0, 1, 2)] == [27, 35, 2]


@pytest.mark.parametrize(
  ("prompts", "codes", "length"),
  [(130, 64, 256), (131, 64, 288), (514, 256, 1024), (515, 256, 1152), (1000, 1024, 3072)],
)
def test_long_rows_fit_the_attention_kernels(prompts, codes, length):
  assert grpo.row_length(prompts, 2, codes) == length


def padded(rows):
  """Returns inputs, positions and segment IDs of streams that each have a row of their own."""
  arrays = np.full((3, 16, 64), VOCAB.pad, np.int32)
  arrays[1:] = 0
  for i, (ids, at) in enumerate(stream for row in rows for stream in row):
    arrays[:, i, 1 - len(ids) :] = ids[:-1], at[:-1], np.ones(len(ids) - 1)
  return arrays


def naive_loss(params, model, rollout, reference, kl_weight, temperature):
  """Computes the loss by definition: combines all logits of the streams, then keeps image codes."""
  rows = padded(streams_of(model.family, np.asarray(rollout.codes)))

  def policy_of(params):
    logits = model_logits(model, params, *rows)[:, -IMAGE:]
    pairs = logits.reshape(8, 2, IMAGE, -1)
    guided = WEIGHTS[0] * pairs[:, 0] + WEIGHTS[1] * pairs[:, 1]
    return jax.nn.log_softmax(guided[..., VOCAB.text_size :] / temperature)

  found, of_reference = policy_of(params), policy_of(reference)
  kl = jnp.sum(jnp.exp(of_reference) * (of_reference - found), -1).mean()
  one_hot = jax.nn.one_hot(rollout.codes, VOCAB.image_size)
  values = jnp.sum(found * one_hot, -1) * rollout.advantages[:, None]
  return -values.mean() + kl_weight * kl


def test_a_step_follows_the_gradient_of_its_definition():
  model, kl_weight, temperature = model_config("modern"), 0.3, 0.7
  values = np.float32([1, -1, 0.5, -0.5, 0, 0, -2, 2])
  rollout = rollout_of("modern", values)
  rate = 0.5
  optimizer = create_optimizer(
    OptimizerConfig(learning_rate=rate, warmup_steps=0, clip_norm=1e9), 10
  )
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, reference = random_params(model), random_params(model, seed=1)
    options = (model, rollout, reference, kl_weight, temperature)
    value, expected = jax.jit(jax.value_and_grad(lambda p: naive_loss(p, *options)))(params)
    expected = jax.device_get(expected)
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params, reference = random_params(model), random_params(model, seed=1)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    step = jax.jit(
      functools.partial(grpo.policy_step, model, optimizer, VOCAB.text_size, kl_weight, temperature)
    )
    new, metrics = step(state, reference, grpo.place(rollout))
    # Adam's first moment is the gradient times (1 - b1).
    moment = jax.device_get(new.opt_state[1][0].mu)
  assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4)
  assert float(metrics["kl"]) > 0.1
  assert int(new.step) == 1
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  for a, b in zip(jax.tree.leaves(moment), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a / 0.1, b, atol=2e-4 * scale)


@pytest.mark.parametrize("teaches", [False, True])
def test_a_step_whose_groups_teach_nothing_leaves_the_parameters_unchanged(teaches):
  """The gradient is rounding noise then, but an update of Adam does not depend on its size."""
  model = model_config("modern")
  values = np.float32([1, -1, 0, 0, 0, 0, 0, 0]) * teaches
  optimizer = create_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, reference = random_params(model), random_params(model, seed=1)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    step = functools.partial(grpo.policy_step, model, optimizer, VOCAB.text_size, 0.3, 0.7)
    new, _ = jax.jit(step)(state, reference, grpo.place(rollout_of("modern", values)))
  leaves = map(jax.tree.leaves, jax.device_get((new.params, params)))
  changed = [bool((a != b).any()) for a, b in zip(*leaves)]
  assert any(changed) == teaches
  assert int(new.step) == 1
