"""Tests that a Generator equals uncached passes: guided, batched, padded, sharded, stopped."""

# S guidance streams, G generated tokens.

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.decoding import batch
from cm3leon_jax.decoding import generator as generator_lib
from cm3leon_jax.decoding import programs as compile_lib
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.grammar import Grammar, plan_array
from cm3leon_jax.decoding.result import sample_seed
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import shard
from cm3leon_jax.models.products import Transposed
from tests.decoding.small import (
  ANYTHING,
  CODES,
  GREEDY,
  IMAGE,
  MIXTURE,
  OTHER,
  POSITIONS,
  SEEDS,
  VOCAB,
  A,
  B,
  guided_requests,
  on_mesh,
  plain_requests,
  small_generator,
  teacher_forced,
)
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("one_device")


def same(found, expected, atol=1e-5):
  assert len(found) == len(expected)
  for a, b in zip(found, expected):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=atol)
    assert (a.seed, a.contrastive) == (b.seed, b.contrastive)


def differ(found, expected) -> bool:
  return any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(found, expected))


@functools.partial(jax.jit, static_argnums=0)
def walk(grammar, plan, ids):
  """Returns [G, V] bool: for each position of `ids` [G], which ids were legal there."""

  plan = shard(plan, "batch", None, None)

  def step(state, token):
    legal = grammar.legal(plan, state, jnp.arange(VOCAB.size))[0]
    return grammar.advance(plan, state, shard(token[None], "batch")), legal

  return jax.lax.scan(step, grammar.start(plan), ids)[1]


def legal_log_probs(request, ids, logits):
  """Returns log-probabilities [G, V] of guided logits [G, V], normalized over the legal ids."""
  legal = np.asarray(walk(Grammar(VOCAB, IMAGE), plan_array([request.plan]), ids))
  return np.asarray(jax.nn.log_softmax(np.where(legal, logits, -np.inf), axis=-1))


def chosen(log_probs, ids):
  return np.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0]


def test_streams_equal_separate_passes(generator, params):
  """Compares log_probs with uncached passes of both streams."""
  guidance = 3.0
  sampling = dataclasses.replace(generator.config.sampling, guidance=guidance)
  results = generator.generate(guided_requests(), SEEDS, sampling=sampling)
  for request, result in zip(guided_requests(), results):
    c, u = (
      teacher_forced(generator.config.model, params, s, result.tokens) for s in request.streams
    )
    expected = legal_log_probs(request, result.tokens, u + guidance * (c - u))
    np.testing.assert_allclose(result.log_probs, chosen(expected, result.tokens), atol=3e-5)
    unguided = chosen(legal_log_probs(request, result.tokens, u), result.tokens)
    assert np.abs(result.log_probs - unguided).max() > 0.1


def test_divergence_is_the_mean_kl_of_the_streams_over_image_codes(generator, params):
  for request, result in zip(guided_requests(), generator.generate(guided_requests(), SEEDS)):
    p, q = (
      jax.nn.log_softmax(
        teacher_forced(generator.config.model, params, s, result.tokens)[:, VOCAB.text_size :]
      )
      for s in request.streams
    )
    kl = np.asarray((jnp.exp(p) * (p - q)).sum(axis=-1))[VOCAB.is_image(result.tokens)]
    np.testing.assert_allclose(result.divergence, kl.mean(), rtol=1e-3)
    assert result.divergence > 0.01


def test_a_stream_alone_equals_a_separate_pass(plain_generator, params):
  for request, result in zip(plain_requests(), plain_generator.generate(plain_requests(), SEEDS)):
    logits = teacher_forced(plain_generator.config.model, params, request.streams[0], result.tokens)
    expected = legal_log_probs(request, result.tokens, logits)
    np.testing.assert_allclose(result.log_probs, chosen(expected, result.tokens), atol=3e-5)
    assert np.abs(result.log_probs - chosen(logits, result.tokens)).max() > 0.1


def edits():
  return [request_lib.edit(VOCAB, IMAGE, A, CODES, B), request_lib.edit(VOCAB, IMAGE, B, OTHER, A)]


def test_edit_equals_the_formula_on_separate_passes(generator, params):
  """Greedy tokens maximize u + s_img (i - u) + s_txt (f - i), computed from uncached passes."""
  sampling = dataclasses.replace(GREEDY, image_guidance=1.5, edit_guidance=7.5)
  for request, result in zip(edits(), generator.generate(edits(), SEEDS[:2], sampling=sampling)):
    f, i, u = (
      teacher_forced(generator.config.model, params, s, result.tokens) for s in request.streams
    )
    expected = legal_log_probs(request, result.tokens, u + 1.5 * (i - u) + 7.5 * (f - i))
    np.testing.assert_allclose(result.log_probs, chosen(expected, result.tokens), atol=1e-4)
    np.testing.assert_array_equal(result.tokens, expected.argmax(axis=-1))
    swapped = legal_log_probs(request, result.tokens, u + 7.5 * (i - u) + 1.5 * (f - i))
    assert np.abs(result.log_probs - chosen(swapped, result.tokens)).max() > 0.1


def test_a_request_does_not_depend_on_its_batch(generator):
  """Requests with different prompts and plans give the same results in one batch and alone."""
  requests = guided_requests()
  together = generator.generate(requests, SEEDS)
  alone = [generator.generate([r], [seed])[0] for r, seed in zip(requests, SEEDS)]
  same(together, alone)
  # The mixture chooses by the seed.
  assert [r.contrastive for r in together] == [seed != 14 for seed in SEEDS]
  assert differ(generator.generate(requests, SEEDS[::-1]), alone)


def test_wide_models_give_the_same_samples_with_transposed_matrices(generator, params, monkeypatch):
  monkeypatch.setattr(generator_lib, "WIDE", generator.config.model.width)
  wide = small_generator(params=params, sampling=MIXTURE, batch_size=4)
  assert isinstance(wide.params.head, Transposed)
  assert not isinstance(generator.params.head, Transposed)
  requests = guided_requests()
  same(wide.generate(requests, SEEDS), generator.generate(requests, SEEDS))


def test_samples_of_a_request_are_requests_with_seeds_of_their_own(generator):
  request = guided_requests()[3]
  sampling = dataclasses.replace(MIXTURE, method="contrastive")
  together = generator.generate([request], [5], samples=4, sampling=sampling)
  assert [(r.request, r.sample, r.seed) for r in together] == [
    (0, i, sample_seed(5, i)) for i in range(4)
  ]
  assert sample_seed(5, 0) == 5
  alone = [
    generator.generate([request], [sample_seed(5, i)], sampling=sampling)[0] for i in range(4)
  ]
  same(together, alone)
  assert len({tuple(r.tokens) for r in together}) == 4


def all_results(generator):
  return generator.generate(guided_requests(), SEEDS)


@pytest.fixture(scope="module")
def on_one_device(generator):
  with on_mesh():
    return all_results(generator)


@pytest.mark.parametrize(
  "shape",
  [(2, 2, 2), pytest.param((1, 1, 8), marks=pytest.mark.slow)],
)
def test_eight_devices_equal_one(on_one_device, shape):
  with on_mesh(*shape):
    generator = small_generator(sampling=MIXTURE)
    head = generator.params.head
    vocab = head.sharding.shard_shape(head.shape)[1]
    assert vocab == VOCAB.size // shape[2]
    same(all_results(generator), on_one_device)


@pytest.fixture
def grown(plain_generator, monkeypatch):
  """Starts caches with a capacity of two tokens; returns a list of the sizes of later growths."""
  grown, plain = [], plain_generator.programs.grow
  monkeypatch.setattr(batch, "BUCKET", 4)
  monkeypatch.setattr(compile_lib, "CAPACITY", 2)
  monkeypatch.setattr(compile_lib, "CHUNK", 3)
  monkeypatch.setattr(
    plain_generator.programs,
    "grow",
    lambda loop, by, *rest: grown.append(by) or plain(loop, by, *rest),
  )
  return grown


def documents(length: int):
  return [request_lib.document(VOCAB, IMAGE, [a], length) for a in (A, B)]


def test_a_cache_that_grows_equals_plain_passes(plain_generator, params, grown):
  requests, reported = documents(12), []
  options = {"sampling": ANYTHING, "progress": reported.append}
  results = plain_generator.generate(requests, SEEDS[:2], **options)
  assert grown == [10]
  assert reported == [2, 3, 3, 3, 1]
  for request, result in zip(requests, results):
    logits = teacher_forced(plain_generator.config.model, params, request.streams[0], result.tokens)
    expected = legal_log_probs(request, result.tokens, logits)
    np.testing.assert_allclose(result.log_probs, chosen(expected, result.tokens), atol=3e-5)


def test_no_step_makes_a_nan(generator, plain_generator):
  """Neither padding rows nor finished samples nor illegal ids produce NaNs."""
  broken = copy.copy(generator)
  broken.params = generator.params._replace(head=generator.params.head * np.nan)
  with jax.debug_nans(True):
    results = generator.generate(guided_requests(), SEEDS) + plain_generator.generate(
      plain_requests(), SEEDS
    )
    assert all(np.isfinite(r.log_probs).all() for r in results)
    # Negative control: NaN parameters raise an error.
    with pytest.raises(Exception, match="nan"):
      broken.generate(guided_requests(), SEEDS)


def test_other_numbers_do_not_compile_again(generator, caplog):
  first = generator.generate(guided_requests(), SEEDS)
  with jax.log_compiles():
    other = dataclasses.replace(
      MIXTURE, guidance=5.0, temperature=0.7, top_p=0.5, contrastive_alpha=0.1
    )
    assert differ(generator.generate(guided_requests(), SEEDS, sampling=other), first)
    assert "Compiling jit" not in caplog.text
    # Negative control: another number of candidates (top_k) compiles again.
    generator.generate(guided_requests(), SEEDS, sampling=dataclasses.replace(MIXTURE, top_k=19))
    assert "Compiling jit" in caplog.text


def test_batches_come_in_order(plain_generator):
  """Batches have up to batch_size samples with the same number of streams, in the given order."""
  generator = copy.copy(plain_generator)
  generator.config = dataclasses.replace(generator.config, batch_size=3)
  requests, reported = [*guided_requests()[:2], guided_requests()[3], *plain_requests()[:2]], []
  batches = list(generator.batches(requests, range(5), samples=2, progress=reported.append))
  assert [[(r.request, r.sample) for r in b] for b in batches] == [
    [(0, 0), (0, 1), (1, 0)],
    [(1, 1), (2, 0), (2, 1)],
    [(3, 0), (3, 1), (4, 0)],
    [(4, 1)],
  ]
  assert reported == [7, 7, 7, 7]
  assert [r.seed for r in batches[1]] == [sample_seed(1, 1), 2, sample_seed(2, 1)]


def test_bad_calls(generator):
  long = request_lib.text_to_image(VOCAB, IMAGE, np.full(POSITIONS - 2, 20))
  with refused(UserError, "128 tokens", "121"):
    generator.generate([long], [0])
