"""Samplers: literals, properties, and the exact distribution of each."""

import functools
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cm3leon_jax.decoding.config import METHODS, SamplingConfig
from cm3leon_jax.decoding.sampling import (
  RowSettings,
  SamplingValues,
  combine_streams,
  contrastive_rows,
  contrastive_scores,
  filter_candidates,
  sample,
  select,
)
from cm3leon_jax.mesh import MeshConfig, create_mesh, shard

PROBABILITIES = [0.1, 0.4, 0.2, 0.3]
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
  return sample(guided, keys, rows, candidates, expert, amateur, contrastive_k)


@functools.partial(jax.jit, static_argnames="candidates")
def sample_top_p(guided, keys, rows, candidates):
  return sample(guided, keys, rows, candidates)


jit_filter = jax.jit(filter_candidates, static_argnums=3)
jit_scores = jax.jit(contrastive_scores, static_argnums=2)


def rows_of(*settings) -> RowSettings:
  """Makes RowSettings of rows, which are tuples of its fields."""
  dtypes = (np.float32, np.int32, np.float32, bool, np.float32, np.float32)
  return RowSettings(*(np.array(column, dtype) for column, dtype in zip(zip(*settings), dtypes)))


def top(temperature=1.0, top_k=0, top_p=1.0):
  return (temperature, top_k, top_p, False, 0.5, 0.5)


def cdk(temperature=0.8, alpha=0.5, amateur_temperature=0.5):
  return (temperature, 1, 0.1, True, alpha, amateur_temperature)  # top_k and top_p have no effect.


def kept(probabilities, top_k, top_p, candidates=0):
  logits = jnp.log(jnp.array([probabilities]))
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
    (0, 0.41, [1, 3]),  # 3 has 0.4 before it.
    (0, 0.75, [1, 2, 3]),
    (3, 0.6, [1, 3]),  # The docstring's example: after top-k, 2 has 0.78 before it.
    (3, 0.8, [1, 2, 3]),
    (9, 1e-6, [1]),
  ],
)
def test_filter_literals(top_k, top_p, ids):
  assert kept(PROBABILITIES, top_k, top_p) == ids


def test_filter_keeps_at_most_the_candidates():
  assert kept(PROBABILITIES, 0, 1.0, candidates=3) == [1, 2, 3]
  assert kept(PROBABILITIES, 2, 1.0, candidates=3) == [1, 3]


def test_filter_never_keeps_an_illegal_token():
  assert kept([0.4, 0.0, 0.6, 0.0], 3, 1.0) == [0, 2]


@settings(max_examples=30, deadline=None)
@given(
  st.integers(0, 2**31 - 1),
  st.lists(st.tuples(st.integers(1, 12), st.floats(0.01, 1.0)), min_size=3, max_size=3),
)
def test_filter_keeps_the_smallest_sufficient_set(seed, rows):
  """Each row keeps its most probable tokens, and no smaller set of them reaches its top_p."""
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


def test_candidates_bound_the_sort():
  """Only the selection of candidates works on the whole vocabulary; without an expert no CD-K."""
  logits, keys = jnp.zeros((2, 500)), jax.random.split(jax.random.key(0), 2)

  def program(candidates, *streams):
    traced = jax.make_jaxpr(lambda rows: sample(logits, keys, rows, candidates, *streams))
    return str(traced(rows_of(top(), top())))

  assert "sort[" not in program(8)
  assert program(8).count("top_k[") == 1
  assert "k=8" in program(8)
  assert "k=500" in program(0)
  assert program(8, logits, logits).count("top_k[") == 2


def exact_top(temperature=1.0, top_k=0, top_p=1.0):
  """Distribution of one sample in float64, independent of the code, like the next two."""
  p = np.exp(GUIDED.astype(np.float64) / temperature)
  order = np.argsort(-p)[: top_k or VOCABULARY]
  p_kept = p[order] / p[order].sum()
  order = [i for i, before in zip(order, np.cumsum(p_kept) - p_kept) if before < top_p]
  out = np.zeros_like(p)
  out[order] = p[order] / p[order].sum()
  return out


def exact_scores(expert, amateur, k, alpha):
  p, q = (
    np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (expert, amateur)
  )
  legal = p > 0
  ranked = sorted(p, reverse=True)
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(
      legal & (p >= alpha * ranked[min(k, len(p)) - 1]), np.log(p) - np.log(q), -np.inf
    )


def exact_cdk(temperature=0.8, alpha=0.5, amateur_temperature=0.5, k=K):
  p = np.exp(exact_scores(EXPERT, AMATEUR / amateur_temperature, k, alpha) / temperature)
  return p / p.sum()


# Setting, its distribution, and another distribution that a test must reject.
CASES = {
  "temperature": (top(0.7), exact_top(0.7), exact_top(0.8)),
  "top-k": (top(top_k=7), exact_top(top_k=7), exact_top(top_k=8)),
  "top-p": (top(top_p=0.8), exact_top(top_p=0.8), exact_top(top_p=0.9)),
  "top-k, then top-p": (
    top(0.8, 6, 0.9),
    exact_top(0.8, 6, 0.9),
    exact_top(0.8, 6),
  ),  # top-p, then top-k
  "CD-K": (cdk(), exact_cdk(), exact_cdk(k=1)),
  "CD-K, alpha": (cdk(alpha=0.2), exact_cdk(alpha=0.2), exact_cdk(alpha=0.5)),
  "CD-K, temperature": (cdk(1.2), exact_cdk(1.2), exact_cdk(1.0)),
  "CD-K, amateur": (cdk(amateur_temperature=1.0), exact_cdk(amateur_temperature=1.0), exact_cdk()),
}
IMAGE, CONTRASTIVE, TEXT = exact_top(0.9, 9, 0.8), exact_cdk(), exact_top(1.3, 0, 0.95)
MIXTURE = {  # Rows in turn: of a mixture's image tokens, and text tokens.
  "image, top-p": (IMAGE, TEXT),
  "image, CD-K": (CONTRASTIVE, IMAGE),
  "text, even sample": (TEXT, IMAGE),
  "text, odd sample": (TEXT, CONTRASTIVE),
}


def counts(rows: RowSettings, number: int) -> np.ndarray:
  """Histograms [number, V] of a batch in which every `number`-th row has the same setting."""

  def repeat(row):
    return np.tile(row, (len(CASES) * DRAWS, 1))

  keys = jax.random.split(jax.random.key(0), len(CASES) * DRAWS)
  rows = jax.tree.map(lambda x: np.resize(x, len(keys)), rows)
  tokens = np.asarray(sample_rows(repeat(GUIDED), keys, rows, repeat(EXPERT), repeat(AMATEUR))[0])
  return np.stack([np.bincount(tokens[i::number], minlength=VOCABULARY) for i in range(number)])


def p_value(counts, p) -> float:
  """Of a chi-square test; 0 if a sample has no probability."""
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
  contrastive = jnp.tile(contrastive_rows("mixture", [0], 2).ravel(), 2)
  is_image = jnp.array([True, True, False, False])
  return dict(
    zip(MIXTURE, counts(select(is_image, contrastive, SamplingValues.of(config)), len(MIXTURE)))
  )


@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_exact_distribution(case):
  _, expected, other = CASES[case]
  histogram = case_counts()[case]
  assert p_value(histogram, expected) > 1e-3
  assert p_value(histogram, other) < 1e-6


@pytest.mark.parametrize("case", MIXTURE)
def test_a_batch_mixes_methods_and_modalities(case):
  expected, other = MIXTURE[case]
  histogram = mixture_counts()[case]
  assert p_value(histogram, expected) > 1e-3
  assert p_value(histogram, other) < 1e-6


def test_three_streams_follow_the_exact_distribution():
  """As those of an edit: nothing, image and instruction, image alone."""
  generator = np.random.default_rng(11)
  streams = generator.normal(size=(3, 1, VOCABULARY)).astype(np.float32)
  streams[:, :, ILLEGAL] = -1e9
  weights = np.array([0.4, 1.7, -1.1], np.float32)

  def distribution(weights):
    logits = np.einsum("s,sv->v", weights, streams[:, 0].astype(np.float64))
    logits[ILLEGAL] = -np.inf
    probabilities = np.exp(logits - logits.max())
    return probabilities / probabilities.sum()

  guided = combine_streams(jnp.asarray(streams), jnp.asarray(weights)).at[:, ILLEGAL].set(-jnp.inf)
  keys = jax.random.split(jax.random.key(2), DRAWS)
  tokens = sample_top_p(jnp.tile(guided, (DRAWS, 1)), keys, rows_of(*[top()] * DRAWS), 0)[0]
  histogram = np.bincount(np.asarray(tokens), minlength=VOCABULARY)
  assert p_value(histogram, distribution(weights)) > 1e-3
  assert p_value(histogram, distribution(weights[[0, 2, 1]])) < 1e-6


def test_contrastive_scores_literals():
  expert, amateur = (
    jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])),
    jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.1]])),
  )
  np.testing.assert_allclose(
    np.exp(jit_scores(expert, amateur, 2, 0.4)), [[1, 3, 0.5, 0]], rtol=1e-5
  )
  np.testing.assert_allclose(np.exp(jit_scores(expert, amateur, 1, 0.4)), [[1, 3, 0, 0]], rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_contrastive_scores_are_those_of_plain_numpy(k):
  """Rows with all, some, five and one legal ids: some have fewer than k."""
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


def test_k_of_one_is_contrastive_decoding():
  """Li et al. 2022: the most probable token sets the threshold."""
  expert, amateur = jax.random.normal(jax.random.key(0), (2, 5, 30))
  p, q = jax.nn.softmax(expert), jax.nn.softmax(amateur)
  expected = np.where(p >= 0.1 * p.max(axis=1, keepdims=True), np.log(p / q), -np.inf)
  np.testing.assert_allclose(jit_scores(expert, amateur, 1, 0.1), expected, atol=1e-5)
  assert np.isfinite(jit_scores(expert, amateur, 2, 0.1)).sum() > np.isfinite(expected).sum()


SMALL = _rng.normal(size=(3, 6, 30)).astype(np.float32)
SMALL_ROWS = [top(1.0, 20, 0.9), cdk(alpha=0.1), top(0.5, 3), cdk(2.0), top(1.5, 0, 0.6), top(3.0)]


def small(rows, part=slice(None)):
  guided, expert, amateur = SMALL[:, part]
  return sample_rows(
    guided, jax.random.split(jax.random.key(3), 6)[part], rows_of(*rows[part]), expert, amateur
  )


def test_greedy_is_the_argmax():
  tokens, log_probs = small([top(1.0, 1, 0.9)] * 6)
  np.testing.assert_array_equal(tokens, np.argmax(SMALL[0], -1))
  np.testing.assert_allclose(log_probs, jax.nn.log_softmax(SMALL[0]).max(-1), rtol=1e-6)


def test_log_probs_are_those_of_the_guided_distribution():
  tokens, log_probs = small(SMALL_ROWS)
  assert (tokens.dtype, log_probs.dtype) == (jnp.int32, jnp.float32)
  np.testing.assert_allclose(
    log_probs, np.asarray(jax.nn.log_softmax(SMALL[0]))[range(6), tokens], rtol=1e-6
  )


def test_a_row_does_not_depend_on_the_others():
  together = np.asarray(small(SMALL_ROWS)[0])
  alone = [int(small(SMALL_ROWS, slice(i, i + 1))[0][0]) for i in range(6)]
  assert together.tolist() == alone


def test_settings_of_rows_are_those_of_separate_calls():
  together = np.asarray(small(SMALL_ROWS)[0])
  traced = len(traces)
  separate = np.stack([small([row] * 6)[0] for row in SMALL_ROWS])
  np.testing.assert_array_equal(together, separate.diagonal())
  assert any((row != together).any() for row in separate)
  assert len(traces) == traced  # Another setting does not recompile.


def test_a_batch_split_over_devices_samples_the_same():
  config = SamplingConfig("mixture", top_k=12, contrastive_k=K)
  streams = jax.random.normal(jax.random.key(0), (3, 8, 30))
  flags = [np.arange(8) < 6, np.arange(8) % 2 == 1]
  bound = config.candidates(image=True, text=True)

  @jax.jit
  def tokens(guided, expert, amateur, seeds, is_image, contrastive, values):
    keys = jax.vmap(jax.random.key)(seeds)
    return sample(
      guided,
      keys,
      select(is_image, contrastive, values),
      bound,
      expert,
      amateur,
      config.contrastive_k,
    )

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


def test_which_rows_are_contrastive():
  np.testing.assert_array_equal(contrastive_rows("mixture", [4, 7], 3), [[0, 1, 0], [0, 1, 0]])
  np.testing.assert_array_equal(contrastive_rows("mixture", [4, 7], 1), [[0], [1]])
  assert contrastive_rows("contrastive", [4, 7], 2).all()
  assert not contrastive_rows("top_p", [4, 7], 2).any()


def test_text_is_never_contrastive():
  rows = select(
    jnp.array([True, False]),
    jnp.array([True, True]),
    SamplingValues.of(SamplingConfig("contrastive")),
  )
  assert rows.contrastive.tolist() == [True, False]
  np.testing.assert_allclose(rows.temperature, [0.8, 1.0])
  assert [x.dtype for x in rows] == [
    jnp.float32,
    jnp.int32,
    jnp.float32,
    jnp.bool,
    jnp.float32,
    jnp.float32,
  ]


@pytest.mark.parametrize(
  ("top_k", "text_top_k", "expected"),  # Of image tokens, of text tokens, of both in one batch.
  [
    (256, 0, (256, 0, 0)),
    (256, 40, (256, 40, 256)),
    (256, 400, (256, 400, 400)),
    (0, 1, (0, 1, 0)),
  ],
)
def test_candidates(top_k, text_top_k, expected):
  config = SamplingConfig(top_k=top_k, text_top_k=text_top_k)
  assert (
    tuple(
      config.candidates(image=i, text=t) for i, t in ((True, False), (False, True), (True, True))
    )
    == expected
  )


@pytest.mark.parametrize("method", METHODS)
def test_config_takes_every_method(method):
  assert SamplingConfig(method).method == method


NEAR_TIES = (0.01, 64, 0.9, 20_000)
OTHER_TIES = set(itertools.product((0.01, 1.0), (0, 64), (0.9, 1.0), (20_000,))) - {NEAR_TIES}


@pytest.mark.parametrize(
  ("spread", "top_k", "top_p", "rows"),
  [
    NEAR_TIES,
    (0.01, 0, 0.9, 4_000),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(OTHER_TIES)),
  ],
)
def test_rounding_of_logits_changes_no_token(spread, top_k, top_p, rows):
  """As another batch, bucket or mesh rounds them: near ties then swap their places in the order."""
  size = 256
  generator = np.random.default_rng(5)
  logits = (spread * generator.normal(size=(rows, size))).astype(np.float32)
  rounded = logits + np.float32(1e-7) * generator.choice([-1, 0, 1], (rows, size)).astype(
    np.float32
  )
  keys = jax.random.split(jax.random.key(1), rows)
  settings_of_rows = rows_of(*[top(top_k=top_k, top_p=top_p)] * rows)
  tokens = [sample_top_p(x, keys, settings_of_rows, top_k)[0] for x in (logits, rounded)]
  assert (tokens[0] != tokens[1]).sum() == 0
