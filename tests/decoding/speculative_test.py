"""Tests that decoding several codes per step does not change the distribution of images."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cm3leon_jax.decoding import speculative
from cm3leon_jax.decoding.config import SamplingConfig
from tests.decoding.generator_test import chosen, guided_by
from tests.decoding.small import (
  IMAGE,
  VOCAB,
  guided_requests,
  on_mesh,
  plain_requests,
  small_generator,
  teacher_forced,
)
from tests.models.tiny import random_params

SEEDS, WINDOW = [11, 12, 13], 4
P = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.4, 0.1]])
Q = np.array([[0.1, 0.3, 0.2, 0.4], [0.4, 0.3, 0.2, 0.1]])


def images():
  return [guided_requests()[i] for i in (0, 1, 3)]


@pytest.fixture(scope="module")
def generator(params):
  with on_mesh():
    yield small_generator(params=params, draft_window=WINDOW)


@functools.cache
def verified(n=20_000):
  drafts = np.stack(
    [np.random.default_rng(i).choice(4, n, p=q) for i, q in enumerate(Q)], axis=1
  ).astype(np.int32)
  keys = jax.random.split(jax.random.key(0), n)
  q, p = (jnp.tile(jnp.asarray(x, jnp.float32), (n, 1, 1)) for x in (Q, P))
  return drafts, *map(np.asarray, jax.jit(speculative.verify)(keys, drafts, q, p))


def p_value(tokens, p) -> float:
  counts, support = np.bincount(tokens, minlength=len(p)), np.asarray(p) > 0
  assert counts[~support].sum() == 0
  return stats.chisquare(counts[support], len(tokens) * np.asarray(p)[support]).pvalue


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_token_that_counts_is_one_of_p(place):
  _, holds, tokens = verified()
  accepted = tokens[holds >= place, place]
  assert len(accepted) > 2_000
  assert p_value(accepted, P[place]) > 1e-3
  assert p_value(accepted, [0.2, 0.3, 0.3, 0.2] if place else [0.4, 0.3, 0.3, 0]) < 1e-6  # Control.


def test_drafts_hold_as_often_as_the_distributions_overlap():
  drafts, holds, tokens = verified()
  overlap = np.minimum(P[:2], Q).sum(axis=1)
  assert abs((holds >= 1).mean() - overlap[0]) < 0.02
  assert abs((holds == 2).mean() - overlap.prod()) < 0.02
  np.testing.assert_array_equal(tokens[holds >= 1, 0], drafts[holds >= 1, 0])
  # Code 3 has probability 0 at the first position, so drafts of it are rejected.
  assert not (holds[drafts[:, 0] == 3] > 0).any()


def test_equal_distributions_hold_all():
  keys, drafts = jax.random.split(jax.random.key(1), 50), jnp.full((50, 2), 2)
  p = jnp.tile(jnp.asarray(P, jnp.float32), (50, 1, 1))
  holds, _ = jax.jit(speculative.verify)(keys, drafts, p[:, :2], p)
  assert (holds == 2).all()


def guided(generator, params, request, ids):
  """Returns guided logits [G, K] of all codes in place of each of `ids`, without a cache."""
  c, u = of_streams(generator, params, request, ids)
  return 3 * c - 2 * u


def of_streams(generator, params, request, ids):
  """Returns, for each stream, logits [G, K] of all codes in place of each of `ids`."""
  return [
    teacher_forced(generator.config.model, params, p, ids)[:, VOCAB.text_size :]
    for p in request.streams
  ]


@pytest.mark.slow
def test_three_codes_have_the_joint_distribution_of_single_steps(params):
  """Compares frequencies of the first three codes (27 triples) with exact probabilities."""
  request, sampling = images()[0], SamplingConfig(top_k=3, top_p=1.0, temperature=2.0)
  with on_mesh():
    generator = small_generator(params=params, draft_window=3, batch_size=512, sampling=sampling)
    codes = np.stack(
      [r.codes(VOCAB)[:3] for r in generator.generate([request], [5], samples=3_072)]
    )

  @functools.cache
  def best(prefix):
    ids = VOCAB.image_ids(np.array([*prefix, 0]))
    logits = guided(generator, params, request, ids)[-1] / sampling.temperature
    top = np.argsort(-logits)[:3]
    p = np.exp(logits[top] - logits[top].max())
    return dict(zip(top.tolist(), (p / p.sum()).tolist()))

  with on_mesh():
    exact = {
      (a, b, c): best(())[a] * best((a,))[b] * best((a, b))[c]
      for a in best(())
      for b in best((a,))
      for c in best((a, b))
    }
  assert len(exact) == 27
  counts = dict.fromkeys(exact, 0)
  for image in map(tuple, codes.tolist()):
    counts[image] += 1
  # A chi-square test needs frequent cells, so cells with an expected count below five are merged.
  expected, found = (np.array([table[image] for image in exact]) for table in (exact, counts))
  expected *= len(codes) / expected.sum()
  rare = expected < 5

  def together(x):
    return np.append(x[~rare], x[rare].sum()) if rare.any() else x

  assert stats.chisquare(together(found), together(expected)).pvalue > 1e-3
  flat = expected**0.5  # Negative control: another temperature.
  assert (
    stats.chisquare(together(found), together(flat * expected.sum() / flat.sum())).pvalue < 1e-6
  )


@pytest.mark.parametrize("align_images", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_log_probs_are_those_of_plain_passes_and_the_end_is_sampled(
  generator, params, align_images
):
  if align_images:
    with on_mesh():
      generator = small_generator("modern", align_images=True, draft_window=WINDOW)
      params = random_params(generator.config.model)
  for request, result in zip(images(), generator.generate(images(), SEEDS)):
    assert len(result.tokens) == IMAGE + 1
    assert result.tokens[-1] in (VOCAB.eos, VOCAB.brk)
    logits = guided(generator, params, request, result.tokens)[:IMAGE]
    exact = np.asarray(jax.nn.log_softmax(logits))[np.arange(IMAGE), result.codes(VOCAB)]
    np.testing.assert_allclose(result.log_probs[:IMAGE], exact, atol=3e-5)
    p, q = map(jax.nn.log_softmax, of_streams(generator, params, request, result.tokens))
    kl = np.asarray((np.exp(p) * (p - q)).sum(axis=-1))[:IMAGE]
    np.testing.assert_allclose(result.divergence, kl.mean(), rtol=1e-3)


def test_a_window_has_the_weights_of_its_places_and_the_end_follows_all_codes(generator, params):
  sampling = dataclasses.replace(
    generator.config.sampling, guidance=5.0, guidance_schedule="linear"
  )
  for request, result in zip(images(), generator.generate(images(), SEEDS, sampling=sampling)):
    streams = [
      teacher_forced(generator.config.model, params, p, result.tokens) for p in request.streams
    ]
    expected = guided_by(sampling, request, result.tokens, streams)
    np.testing.assert_allclose(result.log_probs, chosen(expected, result.tokens), atol=1e-4)


def test_an_image_does_not_depend_on_its_batch(generator):
  """An image is the same in another row and batch, where drafts are accepted at other steps."""
  together = generator.generate(images(), SEEDS)
  turned = generator.generate(images()[::-1], SEEDS[::-1])[::-1]
  beside_others = generator.generate(images(), [SEEDS[0], 21, 22])[:1]
  for a, b in itertools.chain(zip(together, turned), zip(together, beside_others)):
    np.testing.assert_array_equal(a.tokens, b.tokens)
  other = generator.generate(images(), SEEDS[::-1])
  assert any((a.tokens != b.tokens).any() for a, b in zip(together, other))


@pytest.mark.slow
def test_an_image_alone_is_that_of_a_batch(generator):
  together = generator.generate(images(), SEEDS)
  for image, request, seed in zip(together, images(), SEEDS):
    [alone] = generator.generate([request], [seed])
    np.testing.assert_array_equal(alone.tokens, image.tokens)


@pytest.mark.slow
def test_a_split_mesh_samples_the_same(generator, params):
  expected = generator.generate(images(), SEEDS)
  with on_mesh(2, 2, 2):
    split = small_generator(draft_window=WINDOW)
    for a, b in zip(split.generate(images(), SEEDS), expected):
      np.testing.assert_array_equal(a.tokens, b.tokens)
      np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def test_requests_that_begin_without_an_image_are_sampled_one_by_one(generator, params):
  with on_mesh():
    expected = small_generator(params=params).generate(plain_requests(), [1, 2, 3, 4])
  for a, b in zip(generator.generate(plain_requests(), [1, 2, 3, 4]), expected):
    np.testing.assert_array_equal(a.tokens, b.tokens)
