from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.evaluation import intervals

# Number of documents per held-out concept: few concepts have many documents, many have one.
SIZES = np.array([18] * 4 + [12] * 2 + [6] * 6 + [1] * 40)
GROUPS = np.repeat(np.arange(len(SIZES)), SIZES)


def test_the_interval_is_that_of_the_docstring():
  found = intervals.mean_interval([2, 4, 9], [1, 1, 1], ["fox", "fox", "cat"])
  effective = pytest.approx(1.8)
  assert found == {"mean": 5.0, "low": 3.0, "high": 9.0, "groups": 2, "effective_groups": effective}


def sample_documents(rng):
  """Draws sums and weights of documents that vary more between concepts than within one."""
  tokens = rng.integers(1, 10, len(GROUPS)).astype(float)
  rates = 3.0 + rng.normal(0, 1, len(SIZES))[GROUPS] + rng.normal(0, 0.3, len(GROUPS))
  return tokens * rates, tokens


def test_intervals_over_concepts_cover_at_their_level_and_those_over_documents_do_not():
  rng = np.random.default_rng(0)
  covered = {"concepts": 0, "documents": 0}
  for seed in range(300):
    sums, tokens = sample_documents(rng)
    for name, groups in (("concepts", GROUPS), ("documents", np.arange(len(GROUPS)))):
      found = intervals.mean_interval(sums, tokens, groups, num_resamples=400, seed=seed)
      covered[name] += found["low"] <= 3.0 <= found["high"]
  assert 0.91 * 300 <= covered["concepts"] <= 0.98 * 300
  assert covered["documents"] < 0.8 * 300


def test_intervals_of_few_equal_concepts_cover_at_their_level():
  rng = np.random.default_rng(1)
  groups, covered = np.repeat(np.arange(6), 5), 0
  for seed in range(300):
    sums = 3.0 + rng.normal(0, 1, 6)[groups] + rng.normal(0, 0.3, 30)
    found = intervals.mean_interval(sums, np.ones(30), groups, num_resamples=400, seed=seed)
    covered += found["low"] <= 3.0 <= found["high"]
  assert 0.91 * 300 <= covered <= 0.98 * 300  # A plain percentile interval would cover only 84%.


@given(st.integers(0, 2**32 - 1))
def test_copies_of_documents_do_not_change_the_interval(seed):
  rng = np.random.default_rng(seed)
  sums, weights = rng.normal(3, 1, 8), rng.integers(1, 10, 8)
  once = intervals.mean_interval(sums, weights, np.arange(8), num_resamples=100)
  order = rng.permutation(24)
  copied = (np.repeat(values, 3)[order] for values in (sums, weights, np.arange(8)))
  assert intervals.mean_interval(*copied, num_resamples=100) == pytest.approx(once)


@pytest.mark.parametrize(
  ("groups", "effective", "sentence"),
  [(101, 23.8, "101 concepts (effectively 24)"), (16, 16.0, "16 concepts"), (1, 1.0, "1 concept")],
)
def test_groups_are_described(groups, effective, sentence):
  found = {"groups": groups, "effective_groups": effective}
  assert intervals.describe_groups(found) == sentence


def test_a_share_is_shown_with_its_interval():
  share = {"share": 0.81, "low": 0.774, "high": 0.841}
  assert intervals.describe_share(share) == "81.0% [77.4, 84.1]"
  assert intervals.describe_share({**share, "low": None, "high": None}) == "81.0%"
  assert intervals.describe_share(None) == "-"
