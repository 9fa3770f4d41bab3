import dataclasses
import itertools

import numpy as np
import pytest

from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.continuous.buckets import bucket_of, largest
from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator
from cm3leon_jax.decoding.request import Hole
from tests.decoding.continuous.engine_test import cases_of, run
from tests.decoding.generator_test import edits
from tests.decoding.small import (
  CODES,
  IMAGE,
  MIXTURE,
  OTHER,
  POSITIONS,
  VOCAB,
  A,
  guided_requests,
  plain_requests,
)

pytestmark = pytest.mark.usefixtures("one_device")
MOST = dataclasses.replace(MIXTURE, top_k=2**20, text_top_k=2**20, temperature=3.0)


def words(count: int) -> np.ndarray:
  return 20 + np.arange(count) % 200


def text(prompt: int, length: int):
  return request_lib.document(VOCAB, IMAGE, [words(prompt)], length)


def image(prompt: int):
  return request_lib.text_to_image(VOCAB, IMAGE, words(prompt))


def edit(prompt: int):
  return request_lib.edit(VOCAB, IMAGE, A, CODES, words(prompt))


def box(prompt: int, codes: int):
  texts = [(words(prompt),)] if prompt else []
  return request_lib.infill(VOCAB, IMAGE, [*texts, (*OTHER[codes:, None], Hole(codes=codes))])


def texts_with_holes(holes: int):
  pieces = [Hole(most_text=1) if i % 2 else words(1) for i in range(2 * holes)]
  return request_lib.infill(VOCAB, IMAGE, [pieces])


def test_requests_of_any_lengths_need_one_more_bucket_for_each_number_of_streams(generator):
  usual = [
    bucket_of(requests[0], MIXTURE, generator)
    for requests in (plain_requests(), guided_requests(), edits())
  ]
  engine = ContinuousGenerator(generator, usual=usual)
  steps = range(2, POSITIONS, 5)
  requests = [
    *(text(n, length) for n, length in itertools.product(steps, steps)),
    *(make(n) for make in (image, edit) for n in steps),
    *(box(n, codes) for n in (0, *steps) for codes in (1, IMAGE - 1)),
    *(texts_with_holes(n) for n in range(1, VOCAB.num_masks)),
  ]
  requests = [request for request in requests if request.positions <= POSITIONS]
  found = {engine.bucket(request, MIXTURE) for request in requests}
  any_candidates = {engine.bucket(request, MOST) for request in requests}
  assert any_candidates == {largest(bucket, generator.config) for bucket in usual}
  assert found == {*usual, *any_candidates}


BEFORE = POSITIONS - IMAGE - 3  # Number of text tokens in the longest prompt for an image.
EXTREMES = {
  1: [text(POSITIONS - 9, 7), text(1, POSITIONS - 9), text(60, 60)],
  2: [image(BEFORE), box(BEFORE - IMAGE - 3, 1), image(1)],
  3: [edit(BEFORE - len(A) - IMAGE - 2), edit(1)],
}
USUAL = {1: plain_requests, 2: guided_requests, 3: edits}


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_samples_of_the_largest_bucket_are_those_of_generate(generator, streams):
  """Batches the longest prompts, longest texts and most candidates with a short request each."""
  usual = bucket_of(USUAL[streams]()[0], MIXTURE, generator)
  engine = ContinuousGenerator(generator, slots=2, chunk=3, usual=[usual])
  cases = cases_of(generator, [EXTREMES[streams]], [MIXTURE, MOST])
  assert run(engine, cases, np.random.default_rng(0), removed=0) == len(cases)
  any_request = largest(usual, generator.config)
  assert any_request in {batch.bucket for batch in engine._batches} <= {usual, any_request}
