import jax
import numpy as np
import pytest

from cm3leon_jax.decoding.sampling.contrastive import contrastive_scores
from tests.decoding.sampling.small_rows import exact_scores

jit_scores = jax.jit(contrastive_scores, static_argnums=2)


def test_contrastive_scores_literals():
  expert, amateur = (
    np.log(np.float32([[0.5, 0.3, 0.15, 0.05]])),
    np.log(np.float32([[0.5, 0.1, 0.3, 0.1]])),
  )
  np.testing.assert_allclose(
    np.exp(jit_scores(expert, amateur, 2, 0.4)), [[1, 3, 0.5, 0]], rtol=1e-5
  )
  np.testing.assert_allclose(np.exp(jit_scores(expert, amateur, 1, 0.4)), [[1, 3, 0, 0]], rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_contrastive_scores_are_those_of_plain_numpy(k):
  """The rows have all, some, five and one legal ids, so some have fewer than k."""
  rng = np.random.default_rng(k)
  expert, amateur = rng.normal(size=(2, 4, 30)).astype(np.float32) * 2
  for row, illegal in enumerate((0, 10, 25, 29)):
    ids = rng.permutation(30)[:illegal]
    expert[row, ids] = amateur[row, ids] = -np.inf
  scores = np.asarray(jit_scores(expert, amateur, k, np.float32(0.3)))
  assert not np.isnan(scores).any()

  def oracle(k):
    return np.stack([exact_scores(e, a, k, 0.3) for e, a in zip(expert, amateur)])

  np.testing.assert_allclose(scores, oracle(k), atol=1e-5)
  assert np.isfinite(scores).sum() > np.isfinite(oracle(1)).sum() or k == 1
  assert np.isfinite(scores).any(axis=1).all()
  assert np.isfinite(scores).sum(axis=1)[3] == 1
