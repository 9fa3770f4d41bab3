"""Guidance, filters and draws: literals, properties and the exact distribution."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cm3leon_jax.decoding.sampling import SamplingConfig, combine_streams, filter_candidates, sample

PROBABILITIES = [0.1, 0.4, 0.2, 0.3]


def kept(probabilities, top_k, top_p):
  values, ids = filter_candidates(jnp.log(jnp.array([probabilities])), top_k, top_p)
  return sorted(np.asarray(ids)[np.isfinite(values)].tolist())


def test_combine_streams():
  logits = jnp.array([[[1.0, 2.0]], [[0.0, 4.0]]])
  np.testing.assert_array_equal(combine_streams(logits, jnp.array([1.0, 0.0])), [[1.0, 2.0]])
  np.testing.assert_array_equal(combine_streams(logits, jnp.array([3.0, -2.0])), [[3.0, -2.0]])


@pytest.mark.parametrize(
  ("top_k", "top_p", "ids"),
  [
    (0, 1.0, [0, 1, 2, 3]),
    (3, 1.0, [1, 2, 3]),
    (1, 1.0, [1]),
    (0, 0.39, [1]),
    (0, 0.41, [1, 3]),  # 3 has 0.4 before it.
    (0, 0.75, [1, 2, 3]),
    (3, 0.6, [1, 3]),  # The docstring's example: after top-k, 2 has 0.78 before it.
    (3, 0.8, [1, 2, 3]),
    (9, 1e-6, [1]),
  ],
)
def test_filter_literals(top_k, top_p, ids):
  assert kept(PROBABILITIES, top_k, top_p) == ids


def test_filter_never_keeps_an_illegal_token():
  values, ids = filter_candidates(jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf]]), 3, 1.0)
  assert sorted(np.asarray(ids)[np.isfinite(values)].tolist()) == [0, 2]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 12), st.floats(0.01, 1.0))
def test_filter_keeps_the_smallest_sufficient_set(seed, top_k, top_p):
  """What stays are the most probable tokens, and no smaller set of them reaches top_p."""
  logits = np.random.default_rng(seed).normal(size=12).astype(np.float32)
  values, ids = (np.asarray(x)[0] for x in filter_candidates(jnp.asarray(logits)[None], top_k, top_p))
  count = np.isfinite(values).sum()
  assert 1 <= count <= top_k
  assert np.isfinite(values[:count]).all()
  np.testing.assert_array_equal(ids, np.argsort(-logits)[:top_k])
  p = np.exp(logits[ids].astype(np.float64))
  p /= p.sum()
  assert p[: count - 1].sum() < top_p + 1e-5
  assert count == top_k or p[:count].sum() >= top_p - 1e-5


def draws(n, logits, temperature, top_k, top_p):
  keys = jax.random.split(jax.random.key(0), n)
  tokens, _ = jax.jit(sample, static_argnums=3)(jnp.tile(logits, (n, 1)), keys, temperature, top_k, top_p)
  return np.bincount(tokens, minlength=logits.shape[-1])


def exact(logits, temperature, top_k, top_p):
  """Distribution of one draw in float64, written independently of the code."""
  p = np.exp(logits.astype(np.float64) / temperature)
  order = np.argsort(-p)[:top_k]
  p_kept = p[order] / p[order].sum()
  order = [i for i, before in zip(order, np.cumsum(p_kept) - p_kept) if before < top_p]
  out = np.zeros_like(p)
  out[order] = p[order] / p[order].sum()
  return out


def test_draws_follow_the_exact_distribution():
  logits, n = np.random.default_rng(3).normal(size=20).astype(np.float32), 20_000
  settings = (0.8, 12, 0.9)
  counts, p = draws(n, logits, *settings), exact(logits, *settings)
  assert counts[p == 0].sum() == 0
  support = p > 0
  assert stats.chisquare(counts[support], n * p[support]).pvalue > 1e-3
  other = exact(logits, 1.0, 12, 1.0)[support]  # Negative control: another temperature.
  assert stats.chisquare(counts[support], n * other / other.sum()).pvalue < 1e-6


def test_greedy_is_the_argmax():
  logits = jax.random.normal(jax.random.key(1), (5, 30))
  tokens, log_probs = sample(logits, jax.random.split(jax.random.key(2), 5), 1.0, 1, 0.9)
  np.testing.assert_array_equal(tokens, jnp.argmax(logits, -1))
  np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits).max(-1), rtol=1e-6)


def test_a_row_does_not_depend_on_the_others():
  logits, keys = jax.random.normal(jax.random.key(1), (6, 30)), jax.random.split(jax.random.key(2), 6)
  together, _ = sample(logits, keys, 1.0, 20, 0.9)
  alone = [int(sample(logits[i : i + 1], keys[i : i + 1], 1.0, 20, 0.9)[0][0]) for i in range(6)]
  assert together.tolist() == alone


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)])
def test_config_refuses(field, value):
  with pytest.raises(ValueError, match=field):
    SamplingConfig(**{field: value})
