"""Compares decoding on an accelerator with decoding on the CPU."""

import functools

import jax
import numpy as np
import pytest

from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator
from tests.decoding.small import GREEDY, SEEDS, guided_requests, model_config, small_generator
from tests.device.devices import cpu_mesh, device_mesh, on_host
from tests.models.tiny import random_params

pytestmark = [pytest.mark.gpu, pytest.mark.tpu]


@functools.cache
def params_of(family):
  with jax.set_mesh(cpu_mesh()):
    return on_host(random_params(model_config(family)))


def sampled(mesh, family="opt", **fields):
  """Samples guided requests on a mesh; returns the tokens and their log-probabilities."""
  with jax.set_mesh(mesh):
    generator = small_generator(family, params_of(family), **fields)
    results = generator.generate(guided_requests(), SEEDS)
  return [r.tokens for r in results], np.concatenate([r.log_probs for r in results])


@pytest.mark.parametrize("family", ["opt", "modern"])
def test_greedy_tokens_equal_those_of_the_cpu(family):
  (tokens, log_probs), (expected, expected_log_probs) = (
    sampled(mesh, family, sampling=GREEDY) for mesh in (device_mesh(), cpu_mesh())
  )
  np.testing.assert_array_equal(np.concatenate(tokens), np.concatenate(expected))
  np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-3)


def test_sampled_tokens_equal_those_of_the_cpu():
  """Random numbers do not depend on the device. As a control, greedy tokens are different."""
  (tokens, _), (expected, _) = (sampled(mesh) for mesh in (device_mesh(), cpu_mesh()))
  np.testing.assert_array_equal(np.concatenate(tokens), np.concatenate(expected))
  greedy = np.concatenate(sampled(device_mesh(), sampling=GREEDY)[0])
  assert not np.array_equal(np.concatenate(tokens), greedy)


def test_continuous_batching_samples_the_same_tokens(on_device):
  generator = small_generator(params=params_of("opt"))
  requests = guided_requests()
  expected = generator.generate(requests, SEEDS)
  engine = ContinuousGenerator(generator, slots=2, chunk=3)
  waiting, found = list(range(len(requests))), {}
  tickets = {}
  while waiting or engine.active:
    while waiting and engine.can_admit(requests[waiting[0]], generator.config.sampling):
      number = waiting.pop(0)
      ticket = engine.admit(requests[number], SEEDS[number], generator.config.sampling)
      tickets[ticket] = number
    for update in engine.step():
      if update.finished:
        found[tickets[update.ticket]] = update.result.tokens
  for number, result in enumerate(expected):
    np.testing.assert_array_equal(found[number], result.tokens)


@pytest.mark.parametrize(
  ("fields", "most"),
  [
    ({"weight_dtype": "int8"}, 0.3),
    ({"cache_dtype": "int8"}, 0.3),
  ],
)
def test_int8_gives_nearly_the_log_probs_of_fp32(fields, most):
  """int8 on the device equals int8 on the CPU, and is near to fp32."""
  (tokens, found), (same, on_cpu), (plain, exact) = (
    sampled(device_mesh(), sampling=GREEDY, **fields),
    sampled(cpu_mesh(), sampling=GREEDY, **fields),
    sampled(device_mesh(), sampling=GREEDY),
  )
  np.testing.assert_array_equal(np.concatenate(tokens), np.concatenate(same))
  np.testing.assert_allclose(found, on_cpu, atol=1e-3)
  # The first token follows the same prompt in both; later ones may follow other tokens.
  starts = np.cumsum([0, *map(len, plain)])[:-1], np.cumsum([0, *map(len, tokens)])[:-1]
  first = np.abs(exact[starts[0]] - found[starts[1]])
  assert 0 < first.max() < most
