"""Tests each sampling method against its exact distribution, alone and mixed in a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding.sampling.rows import (
  RowSettings,
  Sampler,
  SamplingValues,
  StreamLogits,
  sample,
  select,
)
from cm3leon_jax.mesh import MeshConfig, create_mesh, shard
from tests.decoding.sampling.small_rows import (
  cdk,
  exact_scores,
  rows_of,
  top,
)

VOCABULARY, DRAWS, K = 20, 12_000, 4
ILLEGAL = 7

_rng = np.random.default_rng(3)
GUIDED, EXPERT = (_rng.normal(size=VOCABULARY).astype(np.float32) for _ in range(2))
AMATEUR = (0.4 * _rng.normal(size=VOCABULARY)).astype(np.float32)
for _logits in (GUIDED, EXPERT, AMATEUR):
  _logits[ILLEGAL] = -np.inf

traces = []


@functools.partial(jax.jit, static_argnames=("candidates", "contrastive_k"))
def sample_rows(guided, keys, rows, expert, amateur, candidates=0, contrastive_k=K):
  traces.append(guided.shape)
  return sample(StreamLogits(guided, expert, amateur), keys, rows, candidates, contrastive_k)


def test_candidates_bound_the_sort():
  """The program sorts only the candidates, and omits contrastive decoding if no row uses it."""
  logits, keys = jnp.zeros((2, 500)), jax.random.split(jax.random.key(0), 2)

  def program(candidates, contrastive_k=0):
    streams = StreamLogits(logits, logits, logits)
    traced = jax.make_jaxpr(lambda rows: sample(streams, keys, rows, candidates, contrastive_k))
    return str(traced(rows_of(top(), top())))

  assert "sort[" not in program(8)
  assert program(8).count("top_k[") == 1
  assert "k=8" in program(8)
  assert "k=500" in program(0)
  assert program(8, K).count("top_k[") == 2


def exact_top(temperature=1.0, top_k=0, top_p=1.0):
  """Computes the exact top-k and top-p distribution of one sample in NumPy, in float64."""
  p = np.exp(GUIDED.astype(np.float64) / temperature)
  order = np.argsort(-p)[: top_k or VOCABULARY]
  p_kept = p[order] / p[order].sum()
  order = [i for i, before in zip(order, np.cumsum(p_kept) - p_kept) if before < top_p]
  out = np.zeros_like(p)
  out[order] = p[order] / p[order].sum()
  return out


def exact_cdk(temperature=0.8, alpha=0.5, amateur_temperature=0.5, k=K):
  p = np.exp(exact_scores(EXPERT, AMATEUR / amateur_temperature, k, alpha) / temperature)
  return p / p.sum()


# (setting, its distribution, a wrong distribution that the test must reject).
CASES = {
  "temperature": (top(0.7), exact_top(0.7), exact_top(0.8)),
  "top-k": (top(top_k=7), exact_top(top_k=7), exact_top(top_k=8)),
  "top-p": (top(top_p=0.8), exact_top(top_p=0.8), exact_top(top_p=0.9)),
  "top-k, then top-p": (
    top(0.8, 6, 0.9),
    exact_top(0.8, 6, 0.9),
    exact_top(0.8, 6),
  ),
  "CD-K": (cdk(), exact_cdk(), exact_cdk(k=1)),
  "CD-K, alpha": (cdk(alpha=0.2), exact_cdk(alpha=0.2), exact_cdk(alpha=0.5)),
  "CD-K, temperature": (cdk(1.2), exact_cdk(1.2), exact_cdk(1.0)),
  "CD-K, amateur": (cdk(amateur_temperature=1.0), exact_cdk(amateur_temperature=1.0), exact_cdk()),
}
IMAGE, CONTRASTIVE, TEXT = exact_top(0.9, 9, 0.8), exact_cdk(), exact_top(1.3, 0, 0.95)
MIXTURE = {  # Expected distributions of even and of odd rows.
  "image, top-p": (IMAGE, TEXT),
  "image, CD-K": (CONTRASTIVE, IMAGE),
  "text, even sample": (TEXT, IMAGE),
  "text, odd sample": (TEXT, CONTRASTIVE),
}


def counts(rows: RowSettings, number: int) -> np.ndarray:
  """Samples a batch in which `number` settings alternate; returns a histogram [V] of each."""

  def repeat(row):
    return np.tile(row, (len(CASES) * DRAWS, 1))

  keys = jax.random.split(jax.random.key(0), len(CASES) * DRAWS)
  rows = jax.tree.map(lambda x: np.resize(x, len(keys)), rows)
  tokens = np.asarray(sample_rows(repeat(GUIDED), keys, rows, repeat(EXPERT), repeat(AMATEUR))[0])
  return np.stack([np.bincount(tokens[i::number], minlength=VOCABULARY) for i in range(number)])


def p_value(counts, p) -> float:
  """Returns the p-value of a chi-square test; 0 if an impossible token was sampled."""
  if counts[p == 0].any():
    return 0.0
  return stats.chisquare(counts[p > 0], counts.sum() * p[p > 0]).pvalue


@functools.cache
def case_counts():
  return dict(zip(CASES, counts(rows_of(*(row for row, _, _ in CASES.values())), len(CASES))))


@functools.cache
def mixture_counts():
  config = SamplingConfig(
    "mixture", 0.9, 9, 0.8, text_temperature=1.3, text_top_p=0.95, contrastive_k=K
  )
  contrastive = jnp.array([False, True, False, True])
  is_image = jnp.array([True, True, False, False])
  return dict(
    zip(MIXTURE, counts(select(is_image, contrastive, SamplingValues.of(config)), len(MIXTURE)))
  )


@pytest.mark.parametrize("case", [*CASES, *MIXTURE])
def test_samples_follow_the_exact_distribution(case):
  """Also in a batch that mixes methods and modalities."""
  expected, other = CASES[case][1:] if case in CASES else MIXTURE[case]
  histogram = (case_counts() if case in CASES else mixture_counts())[case]
  assert p_value(histogram, expected) > 1e-3
  assert p_value(histogram, other) < 1e-6


SMALL = _rng.normal(size=(3, 6, 30)).astype(np.float32)
SMALL_ROWS = [top(1.0, 20, 0.9), cdk(alpha=0.1), top(0.5, 3), cdk(2.0), top(1.5, 0, 0.6), top(3.0)]


def small(rows, part=slice(None)):
  guided, expert, amateur = SMALL[:, part]
  return sample_rows(
    guided, jax.random.split(jax.random.key(3), 6)[part], rows_of(*rows[part]), expert, amateur
  )


def test_log_probs_are_those_of_the_guided_distribution():
  tokens, log_probs = small(SMALL_ROWS)
  assert (tokens.dtype, log_probs.dtype) == (jnp.int32, jnp.float32)
  np.testing.assert_allclose(
    log_probs, np.asarray(jax.nn.log_softmax(SMALL[0]))[range(6), tokens], rtol=1e-6
  )


def test_settings_of_rows_are_those_of_separate_calls():
  together = np.asarray(small(SMALL_ROWS)[0])
  traced = len(traces)
  separate = np.stack([small([row] * 6)[0] for row in SMALL_ROWS])
  np.testing.assert_array_equal(together, separate.diagonal())
  assert any((row != together).any() for row in separate)
  assert len(traces) == traced  # Changed settings compile nothing.


def test_a_batch_split_over_devices_samples_the_same():
  config = SamplingConfig("mixture", top_k=12, contrastive_k=K)
  streams = jax.random.normal(jax.random.key(0), (3, 8, 30))
  flags = [np.arange(8) < 6, np.arange(8) % 2 == 1]
  sampler = Sampler.of(config)

  @jax.jit
  def tokens(guided, expert, amateur, seeds, is_image, contrastive, values):
    keys = jax.vmap(jax.random.key)(seeds)
    rows = select(is_image, contrastive, values)
    streams = StreamLogits(guided, expert, amateur)
    return sample(streams, keys, rows, sampler.of_all, sampler.contrastive_k)

  seeds = np.arange(8, dtype=np.uint32)
  whole = tokens(*streams, seeds, *flags, SamplingValues.of(config))
  with jax.set_mesh(create_mesh(MeshConfig())):
    split = tokens(
      *(shard(x, "batch", None) for x in streams),
      *(shard(x, "batch") for x in (seeds, *flags)),
      SamplingValues.of(config),
    )
  assert len(split[0].sharding.device_set) == 8
  np.testing.assert_array_equal(whole[0], split[0])
  np.testing.assert_allclose(whole[1], split[1], rtol=1e-6)


def test_text_is_sampled_by_top_p():
  values = SamplingValues.of(SamplingConfig("contrastive", top_k=3, text_top_k=4))
  rows = select(jnp.array([True, False]), jnp.array([True, True]), values)
  assert rows.contrastive.tolist() == [True, False]
  np.testing.assert_allclose(rows.temperature, [0.8, 1.0])
  assert rows.top_k.tolist() == [3, 4]


def test_a_sampler_compiles_for_its_candidates():
  sampling = SamplingConfig(top_k=5, text_top_k=9, contrastive_k=3)
  assert Sampler.of(sampling) == (5, 9, 0)
  mixture = SamplingConfig("mixture", top_k=5, text_top_k=0, contrastive_k=3)
  assert [Sampler.of(mixture, streams) for streams in (2, 1)] == [(5, 0, 3), (5, 0, 0)]
