import numpy as np

from cm3leon_jax.decoding.result import Result
from tests.decoding.small import CODES, VOCAB, A

TOKENS = np.concatenate([A, CODES[:4]]).astype(np.int32)
LOG_PROBS = np.linspace(-1, 0, len(TOKENS), dtype=np.float32)


def result(tokens=TOKENS, contrastive=False, streams=2):
  total = np.float32(0.1)
  return Result.of((3, 1), 7, contrastive, tokens, LOG_PROBS[: len(tokens)], total, streams, VOCAB)


def test_divergence_is_the_mean_over_the_codes():
  assert result().divergence == float(np.float32(0.1)) / 4
  assert result(streams=1).divergence is None
  assert result(tokens=TOKENS[:3]).divergence is None


def test_what_a_result_says():
  one = result(contrastive=True)
  assert (one.request, one.sample, one.seed, one.contrastive) == (3, 1, 7, True)
  assert not result().contrastive
  np.testing.assert_array_equal(one.codes(VOCAB), CODES[:4] - VOCAB.text_size)
