from collections import Counter
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax import templates
from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.rows.cm3 import OVERHEAD
from cm3leon_jax.data.rows.sample_plan import plan_sample
from cm3leon_jax.vocab import VocabLayout

PAIR = [4, 16], [False, True]
NO_CANDIDATES = [].__getitem__
VOCABS = VocabLayout(num_special=32), VocabLayout(num_special=32, template="chameleon")


some_parts = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=4).map(
  lambda segments: ([n for n, _ in segments], [image for _, image in segments])
)


@settings(max_examples=200, deadline=None)
@given(
  st.integers(0, 2**31), some_parts, st.lists(some_parts, max_size=4), st.integers(20, 120),
  st.sampled_from(VOCABS),
)  # fmt: skip
def test_a_sample_never_exceeds_the_row(seed, document, candidates, length, vocab):
  config = DataConfig(sequence_length=length, mean_spans=3.0)
  rng, lengths_of = np.random.default_rng(seed), candidates.__getitem__
  plan = plan_sample(document, len(candidates), lengths_of, rng, config, vocab)
  assert plan.length <= length + 1
  if plan.dropped:
    return
  whole = templates.of(vocab).length([*(candidates[i] for i in plan.neighbors), document])
  whole += OVERHEAD * len(plan.spans)
  if plan.length <= length:
    assert plan.length == whole
  if plan.spans:  # The whole sample fits, because an infill is never cut.
    assert whole <= length + 1


def plan_pair(num_candidates, seed, max_spans=27, **fields):
  rates = {"neighbor_dropout": 0.0, "condition_dropout": 0.0, "mean_spans": 0.0}
  config, rng = DataConfig(**{**rates, **fields}), np.random.default_rng(seed)
  vocab = VocabLayout(num_special=max_spans + 5)
  return plan_sample(PAIR, num_candidates, lambda _: PAIR, rng, config, vocab)


def test_neighbors_are_left_out_before_spans_and_spans_before_the_tail():
  lengths = (1_000, 60, 30, 22, 10)
  plans = [plan_pair(2, 1, 2, mean_spans=50.0, sequence_length=n) for n in lengths]
  assert [len(plan.neighbors) for plan in plans] == [2, 1, 0, 0, 0]
  assert [len(plan.spans) > 0 for plan in plans] == [True, True, True, False, False]
  assert plans[3:] == [((), False, (), 23, 0, 2), ((), False, (), 11, 0, 2)]


def test_fixed_picks_k_of_all_candidates_in_every_order():
  plans = [plan_pair(5, seed) for seed in range(1_000)]
  counts = Counter(p.neighbors for p in plans)
  assert set(counts) == set(itertools.permutations(range(5), 2))
  assert min(counts.values()) > 20  # About 50 of each are expected.
  assert all((p.missing, p.crowded_out) == (0, 0) for p in plans)


def test_paper_picks_three_of_the_first_four_candidates_in_every_order():
  counts = Counter(
    plan_pair(6, seed, neighbor_sampling="paper", num_neighbors=3).neighbors
    for seed in range(1_000)
  )
  assert set(counts) == set(itertools.permutations(range(4), 3))
  assert min(counts.values()) > 15  # About 42 of each are expected.


def test_uniform_picks_any_number_up_to_k():
  counts = Counter(
    len(plan_pair(4, seed, neighbor_sampling="uniform").neighbors) for seed in range(1_500)
  )
  assert set(counts) == {0, 1, 2}
  assert all(abs(n - 500) < 70 for n in counts.values())


def test_fewer_candidates_than_wanted_are_used_and_counted():
  for fields, kept, missing in (
    ({}, 1, 1),
    ({}, 0, 2),
    ({"neighbor_sampling": "paper", "num_neighbors": 3}, 2, 1),
  ):
    plan = plan_pair(kept, 0, **fields)
    assert sorted(plan.neighbors) == list(range(kept))
    assert (plan.missing, plan.crowded_out) == (missing, 0)
  assert sum(
    plan_pair(1, seed, neighbor_sampling="uniform").missing for seed in range(300)
  ) == pytest.approx(100, abs=25)


def test_best_takes_the_first_candidates_in_their_order_as_many_as_fit():
  best = {"neighbor_sampling": "best", "num_neighbors": 3}
  assert plan_pair(4, 0, **best).neighbors == (0, 1, 2)
  assert plan_pair(2, 0, **best)[0::4] == ((0, 1), 1)
  crowded = plan_pair(4, 0, sequence_length=66, **best)
  assert (crowded.neighbors, crowded.crowded_out) == ((0, 1), 1)


def span_plans(lengths, is_image, number=4_000, **fields):
  """Returns plans of one document without neighbors, one per random seed."""
  config = DataConfig(sequence_length=4_096, condition_dropout=0.0, **fields)
  return [
    plan_sample((lengths, is_image), 0, NO_CANDIDATES, rng, config, VOCABS[0])
    for rng in map(np.random.default_rng, range(number))
  ]


def test_the_number_of_spans_is_poisson():
  """30 segments have space for up to 29 spans of whole segments, so no span is dropped."""
  plans = span_plans([5] * 30, [False] * 30, whole_segment_rate=1.0)
  counts = Counter(len(plan.spans) for plan in plans)
  for n, share in enumerate((0.368, 0.368, 0.184, 0.061, 0.015)):
    assert counts[n] / len(plans) == pytest.approx(share, abs=0.025), n


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_spans_are_whole_segments_at_the_configured_rate(rate):
  bounds = [(1, 41), (42, 92), (93, 153)]
  plans = span_plans([40, 50, 60], [False, True, True], whole_segment_rate=rate)
  masked = [plan for plan in plans if len(plan.spans) == 1]
  whole = np.mean([plan.spans[0] in bounds for plan in masked])
  assert len(masked) > 1_000
  # A random span may equal a whole segment by chance, if both of its end points are outside the
  # segment.
  assert rate - 0.05 < whole < rate + (1 - rate) * 0.25 + 0.05


@pytest.mark.parametrize(("lengths", "is_image"), [([30], [False]), ([4, 16], [False, True])])
def test_a_sample_is_never_masked_whole(lengths, is_image):
  plans = span_plans(lengths, is_image, number=1_000)
  assert max(sum(end - start for start, end in plan.spans) for plan in plans) < sum(lengths)
  # The expected share is 1 - 1/e = 0.63.
  assert 0.55 < np.mean([len(plan.spans) > 0 for plan in plans]) < 0.65


@pytest.mark.parametrize(("vocab", "length"), [(VOCABS[0], 20), (VOCABS[1], 19)])
def test_a_conditioning_drop_leaves_nothing_but_an_image(vocab, length):
  config = DataConfig(condition_dropout=1.0, neighbor_dropout=0.0)

  def plan(lengths, is_image):
    rng = np.random.default_rng(0)
    return plan_sample((lengths, is_image), 3, lambda _: PAIR, rng, config, vocab)

  assert plan([4, 16], [False, True]) == ((), True, (), length, 0, 0)
  assert not plan([4], [False]).dropped
  assert not plan([4, 16, 4], [False, True, False]).dropped, "the sample does not end with an image"
