import jax
import numpy as np
import pytest

from cm3leon_jax.models import attention
from tests.models.tiny import mesh_of


def plain(q, k, v, segment_ids):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.einsum("BLNH,BTNH->BNLT", q, k) / q.shape[-1] ** 0.5
  length = q.shape[1]
  seen = np.tril(np.ones((length, length), bool)) & (segment_ids[:, :, None] == segment_ids[:, None, :])
  weights = np.exp(np.where(seen[:, None], scores, -np.inf))
  return np.einsum("BNLT,BTNH->BLNH", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [7, attention.BLOCK, attention.BLOCK + 9])
def test_blocks_of_queries_equal_the_full_matrix_in_fp64(length):
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, length, 2, 8))
  segment_ids = np.sort(np.random.default_rng(0).integers(0, 4, (2, length))).astype(np.int32)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    found = jax.jit(attention.causal_attention)(q, k, v, segment_ids)
  np.testing.assert_allclose(found, plain(q, k, v, segment_ids), atol=2e-5)
  assert np.abs(np.asarray(found) - plain(q, k, v, np.ones_like(segment_ids))).max() > 0.1
