"""Tests that samples with drafts equal those without, in any batch, and take fewer steps."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest

from cm3leon_jax.decoding import drafts
from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator
from tests.decoding.small import (
  IMAGE,
  MIXTURE,
  SEEDS,
  VOCAB,
  guided_requests,
  on_mesh,
  plain_requests,
  small_generator,
)

pytestmark = pytest.mark.usefixtures("one_device")

# All share programs: samples use top-p or contrastive decoding, by their seeds.
SAMPLINGS = [
  MIXTURE,
  dataclasses.replace(MIXTURE, top_p=1e-6, text_top_p=1e-6),  # Greedy.
  dataclasses.replace(MIXTURE, temperature=0.8, top_p=1.0, guidance=1.0),
]


def with_drafts(generator, window):
  generator = copy.copy(generator)
  generator.config = dataclasses.replace(generator.config, drafts=window)
  return generator


def same(found, expected):
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)
    assert (a.seed, a.contrastive) == (b.seed, b.contrastive)
    assert (a.divergence is None) == (b.divergence is None)
    if a.divergence is not None:
      np.testing.assert_allclose(a.divergence, b.divergence, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 3, 16])
def test_samples_equal_those_without_drafts(generator, window):
  drafted, saved = with_drafts(generator, window), []
  for requests, sampling in itertools.product((guided_requests(), plain_requests()), SAMPLINGS):
    expected = generator.generate(requests, SEEDS, sampling=sampling)
    found = drafted.generate(requests, SEEDS, sampling=sampling)
    same(found, expected)
    assert [x.steps for x in expected] == [len(x.tokens) for x in expected]
    assert all(1 <= x.steps <= len(x.tokens) for x in found)
    assert window > 1 or [x.steps for x in found] == [x.steps for x in expected]
    saved += [len(x.tokens) - x.steps for x in found]
  assert window == 1 or sum(saved) > 5  # Random guesses would save nothing.


def test_samples_do_not_depend_on_the_batch(generator):
  requests, drafted = guided_requests(), with_drafts(generator, 3)
  together = drafted.generate(requests, SEEDS)
  [alone] = drafted.generate(requests[3:], SEEDS[3:])
  same([alone], together[3:])
  assert alone.steps == together[3].steps


@pytest.mark.parametrize(("window", "steps"), [(3, 3), (16, 2)])
def test_right_guesses_are_all_kept(generator, window, steps):
  """Six codes and the token after them take these numbers of steps if all guesses are right."""
  requests, sampling = guided_requests()[:2], MIXTURE
  expected = generator.generate(requests, SEEDS[:2], sampling=sampling)
  config = with_drafts(generator, window).config
  used = [x.contrastive for x in expected]
  batch, static = config.batch(requests, SEEDS[:2], used, sampling)
  codes = np.stack([x.codes(VOCAB) for x in expected]).astype(np.int32)
  prompts = batch.prompts._replace(drafts=codes)
  loop, run = generator.programs.prefill(generator.params, batch._replace(prompts=prompts), static)
  ids, *_, taken = generator.programs.results(run(generator.params, batch.control, loop))
  np.testing.assert_array_equal(ids, [x.tokens for x in expected])
  np.testing.assert_array_equal(taken, [steps, steps])


def test_first_guesses_are_the_first_image_of_the_prompt():
  requests = [*guided_requests(), plain_requests()[3]]
  codes = [0, 1, 2, 3, 4, 5]
  expected = [[0] * 6, [0] * 6, [50, 3, 17, 8, 0, 0], codes, codes]
  np.testing.assert_array_equal(drafts.first_guesses(requests, VOCAB, IMAGE), expected)


def test_eight_devices_and_an_int8_cache():
  with on_mesh(2, 2, 2):
    generator = small_generator(sampling=MIXTURE, batch_size=4, cache_dtype="int8")
    expected = generator.generate(guided_requests(), SEEDS)
    same(with_drafts(generator, 3).generate(guided_requests(), SEEDS), expected)


def test_a_window_has_at_most_the_codes_of_an_image(generator):
  assert [with_drafts(generator, n).config.window for n in (0, 3, IMAGE + 1)] == [0, 3, IMAGE]


def test_a_negative_number_of_drafts(generator):
  with pytest.raises(ValueError, match="drafts is -1; it must be at least 0"):
    dataclasses.replace(generator.config, drafts=-1)


def test_continuous_batching_with_drafts(plain_generator):
  sampling = MIXTURE
  cases = []
  for requests in (guided_requests(), plain_requests()):
    results = plain_generator.generate(requests, SEEDS, sampling=sampling)
    cases += zip(requests, SEEDS, results)
  engine = ContinuousGenerator(with_drafts(plain_generator, 4), slots=4, chunk=2)
  waiting, running, finished = [*cases, *cases], {}, {}
  while waiting or engine.active:
    # At most one is admitted before each chunk, so that samples are at different places.
    if waiting and engine.can_admit(waiting[0][0], sampling):
      request, seed, result = waiting.pop(0)
      running[engine.admit(request, seed, sampling)] = result
    for update in engine.step():
      expected = running[update.ticket]
      count = len(update.result.tokens)
      np.testing.assert_array_equal(update.result.tokens, expected.tokens[:count])
      if update.finished:
        finished[update.ticket] = update.result
  assert len(finished) == 2 * len(cases)
  same([finished[ticket] for ticket in running], running.values())
  steps = sum(x.steps for x in finished.values())
  assert steps < sum(len(x.tokens) for x in finished.values())
