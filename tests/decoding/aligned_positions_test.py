import dataclasses
import functools

import jax
import numpy as np
import pytest

from cm3leon_jax.decoding import batch
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.request import Hole
from cm3leon_jax.evaluation.likelihood import bits
from tests.decoding.generator_test import chosen, edits
from tests.decoding.small import CODES, GREEDY, IMAGE, OTHER, SEEDS, VOCAB, A, B, small_generator
from tests.models.tiny import random_params

pytestmark = pytest.mark.usefixtures("one_device")


def aligned_requests():
  """Returns requests of two streams; the captions of their neighbors differ in length."""
  neighbors, other = [(B, CODES), (A, OTHER)], [(A, OTHER)]
  image = functools.partial(request_lib.text_to_image, VOCAB, IMAGE)
  segments = [(A,), (Hole(codes=2), OTHER[2:])]
  return [
    image(A, neighbors),
    image(B, neighbors, keep_neighbors=True),
    image(np.append(A, B), other),
    request_lib.infill(VOCAB, IMAGE, segments, neighbors),
  ]


def scored(model, params, prompt, ids):
  """Scores all codes in place of each of `ids`; returns log-probabilities [G, K]."""
  codes = VOCAB.image_ids(np.arange(VOCAB.image_size))
  starts = [np.concatenate([prompt, ids[:i]]) for i in range(len(ids))]
  samples = [np.append(start, code).astype(np.int32) for start in starts for code in codes]
  rows = bits.score_samples(params, model, samples, VOCAB, len(codes))
  return -np.log(2) * np.reshape([row[-1] for row in rows], (len(ids), len(codes)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shared", "edits"])
def test_aligned_positions_are_those_of_training(kind, monkeypatch):
  """Compares greedy codes and log_probs with scores of whole samples (`bits.score_samples`)."""
  if kind == "shared":
    monkeypatch.setattr(batch, "SHARED", 2)
    monkeypatch.setattr(batch, "BUCKET", 8)
  requests = edits() if kind == "edits" else aligned_requests()
  fields = {"align_images": True, "image_head": False}
  generator = small_generator("modern", sampling=GREEDY, batch_size=4, **fields)
  params, model = random_params(generator.config.model), generator.config.model

  def expected(model, request, ids):
    streams = [scored(model, params, stream, ids) for stream in request.streams]
    weights = request.guidance_weights(GREEDY, IMAGE)[: len(ids)]
    return np.asarray(jax.nn.log_softmax(np.einsum("SGK,GS->GK", streams, weights), axis=-1))

  for request, result in zip(requests, generator.generate(requests, SEEDS[: len(requests)])):
    ids = result.tokens[: request.plan[0].count]
    codes, log_probs = VOCAB.image_codes(ids), result.log_probs[: len(ids)]
    found = expected(model, request, ids)
    np.testing.assert_array_equal(codes, found.argmax(axis=-1))
    np.testing.assert_allclose(log_probs, chosen(found, codes), atol=1e-4)
    # Negative control: plain positions.
    plain = expected(dataclasses.replace(model, align_images=False), request, ids)
    assert np.abs(log_probs - chosen(plain, codes)).max() > 0.01
