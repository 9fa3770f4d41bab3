from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from cm3leon_jax.decoding.sampling.top_p import filter_candidates
from tests.decoding.sampling.small_rows import rows_of, sample_top_p, top

PROBABILITIES = [0.1, 0.4, 0.2, 0.3]

jit_filter = jax.jit(filter_candidates, static_argnums=3)


def kept(probabilities, top_k, top_p, candidates=0):
  logits = np.log(np.float32([probabilities]))
  values, ids = jit_filter(
    logits, np.array([top_k], np.int32), np.array([top_p], np.float32), candidates
  )
  return sorted(np.asarray(ids)[np.isfinite(values)].tolist())


@pytest.mark.parametrize(
  ("top_k", "top_p", "ids"),
  [
    (0, 1.0, [0, 1, 2, 3]),
    (3, 1.0, [1, 2, 3]),
    (1, 1.0, [1]),
    (0, 0.39, [1]),
    (0, 0.41, [1, 3]),  # Id 1 has probability 0.4.
    (0, 0.75, [1, 2, 3]),
    (3, 0.6, [1, 3]),  # After top-k = 3, ids 1 and 3 sum to 0.78.
    (3, 0.8, [1, 2, 3]),
    (9, 1e-6, [1]),
  ],
)
def test_filter_literals(top_k, top_p, ids):
  assert kept(PROBABILITIES, top_k, top_p) == ids


@settings(max_examples=30, deadline=None)
@given(
  st.integers(0, 2**31 - 1),
  st.lists(st.tuples(st.integers(1, 12), st.floats(0.01, 1.0)), min_size=3, max_size=3),
)
def test_filter_keeps_the_smallest_sufficient_set(seed, rows):
  """Each row keeps its most probable tokens: the fewest whose probabilities sum to its top_p."""
  logits = np.random.default_rng(seed).normal(size=(3, 15)).astype(np.float32)
  every_k, every_p = (
    np.array(column, dtype) for column, dtype in zip(zip(*rows), (np.int32, np.float32))
  )
  for row, (values, ids) in enumerate(
    zip(*map(np.asarray, jit_filter(logits, every_k, every_p, 12)))
  ):
    top_k, top_p = rows[row]
    count = np.isfinite(values).sum()
    assert 1 <= count <= top_k
    assert np.isfinite(values[:count]).all()
    np.testing.assert_array_equal(ids, np.argsort(-logits[row])[:12])
    p = np.exp(logits[row, ids[:top_k]].astype(np.float64))
    p /= p.sum()
    assert p[: count - 1].sum() < top_p + 1e-5
    assert count == top_k or p[:count].sum() >= top_p - 1e-5


def test_rounding_of_logits_changes_no_token():
  """Other batches, buckets and meshes round logits differently; near ties must not swap tokens."""
  spread, top_k, top_p, rows, size = 0.01, 0, 0.9, 4_000, 256
  generator = np.random.default_rng(5)
  logits = (spread * generator.normal(size=(rows, size))).astype(np.float32)
  rounded = logits + np.float32(1e-7) * generator.choice([-1, 0, 1], (rows, size)).astype(
    np.float32
  )
  keys = jax.random.split(jax.random.key(1), rows)
  settings_of_rows = rows_of(*[top(top_k=top_k, top_p=top_p)] * rows)
  tokens = [sample_top_p(x, keys, settings_of_rows, top_k)[0] for x in (logits, rounded)]
  np.testing.assert_array_equal(*tokens)
