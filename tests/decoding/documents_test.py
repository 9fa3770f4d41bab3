import re

import numpy as np
import pytest

from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.generation.tasks import document_segments
from tests.decoding.small import ANYTHING, CODES, IMAGE, OTHER, VOCAB, A, B

pytestmark = pytest.mark.usefixtures("one_device")


def test_stops_when_all_samples_are_over(plain_generator):
  """Given documents of up to 24 tokens that end early, decoding stops when all have ended."""
  starts = [[a, b] for a in (A, B) for b in (CODES, OTHER)]
  requests = [request_lib.document(VOCAB, IMAGE, segments, 24) for segments in starts]
  stopped = set()
  for seed in range(30):
    reported = []
    results = plain_generator.generate(
      requests, range(seed, seed + 4), sampling=ANYTHING, progress=reported.append
    )
    assert reported == [max(len(r.tokens) for r in results)]
    stopped.add(reported[0])
  assert min(stopped) < 10 < 24 == max(stopped)


def letters(ids) -> str:
  names = {VOCAB.eos: "e", VOCAB.brk: "b"}
  return "".join("i" if VOCAB.is_image(i) else names.get(int(i), "t") for i in ids)


def test_documents_obey_their_format_and_length(plain_generator):
  """The generated tokens match their regular expression; the segments contain prompt and tokens."""
  segment, length = "(t+|i{6})", 24
  cases = [
    (request_lib.document(VOCAB, IMAGE, [], length), rf"{segment}(b{segment})*e", []),
    (request_lib.document(VOCAB, IMAGE, [CODES, A], length), rf"t*(b{segment})*e", [CODES, A]),
    (request_lib.document(VOCAB, IMAGE, [A, CODES], length), rf"(b{segment})*e", [A, CODES]),
    (
      request_lib.document(VOCAB, IMAGE, [A, CODES], length, after_break=True),
      rf"{segment}(b{segment})*e",
      [A, CODES],
    ),
  ]
  seen = set()
  for seed in range(20):
    for result in plain_generator.generate(
      [case[0] for case in cases], range(seed, seed + 4), sampling=ANYTHING
    ):
      request, pattern, before = cases[result.request]
      text = letters(result.tokens)
      assert re.fullmatch(pattern, text)
      assert len(text) <= length
      seen |= set(re.findall(r"i{6}|b|t", text))
      segments = document_segments(VOCAB, request, result.tokens)
      # The joined segments equal the prompt followed by the generated tokens.
      whole = np.concatenate([request.streams[0], result.tokens])
      joined = np.concatenate([[part] for s in segments for part in (VOCAB.brk, *s)], axis=None)
      np.testing.assert_array_equal([VOCAB.eos, *joined[1:], VOCAB.eos], whole)
      for given, found in zip(before, segments):
        np.testing.assert_array_equal(found[: len(given)], given)
  assert seen == {"i" * 6, "b", "t"}
