from collections import Counter
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax import templates
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.vocab import VocabLayout
from tests.refusals import refused

VOCAB = VocabLayout(num_special=32, text_size=288, image_size=512)
BRK, EOS, EOSS = VOCAB.brk, VOCAB.eos, VOCAB.eoss
M0, M1 = VOCAB.mask(0), VOCAB.mask(1)


def joined(segment_lengths, first=100):
  """Returns </s> 100 101 ... <break> ... </s> with the given segment lengths and distinct ids."""
  tokens = []
  for n in segment_lengths:
    tokens += [*range(first, first + n), BRK]
    first += n
  return np.array([EOS, *tokens[:-1], EOS], np.int32)


def bounds_of(lengths):
  return templates.of(VOCAB).bounds([(lengths, [False] * len(lengths))])


def spans_of(lengths, *args):
  return cm3.sample_spans(bounds_of(lengths), len(joined(lengths)), *args)


def test_apply_moves_a_caption_to_the_end():
  tokens = np.array([EOS, 77, 78, 79, BRK, 291, 292, 293, 294, EOS], np.int32)
  expected = [EOS, M0, BRK, 291, 292, 293, 294, EOS, M0, 77, 78, 79, EOSS]
  np.testing.assert_array_equal(cm3.apply_cm3_mask(tokens, [(1, 4)], VOCAB), expected)


def test_apply_keeps_document_order_of_two_spans():
  tokens = np.array([EOS, 77, 78, 79, BRK, 291, 292, EOS], np.int32)
  expected = [EOS, 77, M0, 79, BRK, 291, M1, EOS, M0, 78, EOSS, M1, 292, EOSS]
  np.testing.assert_array_equal(cm3.apply_cm3_mask(tokens, [(2, 3), (6, 7)], VOCAB), expected)


def test_layout_and_undo_in_literals():
  assert cm3.cm3_layout(6, [(1, 4)]).tolist() == [0, 6, 4, 5, 6, 1, 2, 3, 7]
  masked = np.array([EOS, M0, BRK, 291, 292, 293, 294, EOS, M0, 77, 78, 79, EOSS], np.int32)
  expected = [EOS, 77, 78, 79, BRK, 291, 292, 293, 294, EOS]
  np.testing.assert_array_equal(cm3.undo_cm3_mask(masked, VOCAB), expected)


samples = st.tuples(
  st.lists(st.integers(1, 12), min_size=1, max_size=6),
  st.integers(0, 8),
  st.booleans(),
  st.integers(0, 2**32 - 1),
)


@settings(max_examples=300, deadline=None)
@given(samples)
def test_undo_restores_what_apply_moved(sample):
  lengths, num_spans, whole, seed = sample
  spans = spans_of(lengths, num_spans, whole, np.random.default_rng(seed))
  tokens = joined(lengths)
  masked = cm3.apply_cm3_mask(tokens, spans, VOCAB)
  assert len(masked) == len(tokens) + cm3.OVERHEAD * len(spans)
  np.testing.assert_array_equal(cm3.undo_cm3_mask(masked, VOCAB), tokens)
  if spans:
    assert not np.array_equal(masked, tokens)


@settings(max_examples=300, deadline=None)
@given(samples)
def test_spans_are_disjoint_and_never_cross_a_boundary(sample):
  lengths, num_spans, whole, seed = sample
  spans = spans_of(lengths, num_spans, whole, np.random.default_rng(seed))
  tokens = joined(lengths)
  assert len(spans) <= num_spans
  assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
  for start, end in spans:
    assert start < end
    assert not np.isin(tokens[start:end], [BRK, EOS]).any()
    if whole and len(lengths) > 1:
      assert (start, end) in bounds_of(lengths)


@settings(max_examples=300, deadline=None)
@given(samples)
def test_some_content_always_stays_as_context(sample):
  lengths, num_spans, whole, seed = sample
  spans = spans_of(lengths, num_spans, whole, np.random.default_rng(seed))
  assert sum(end - start for start, end in spans) < sum(lengths)
  if whole and len(lengths) > 1:
    assert len(spans) == min(num_spans, len(lengths) - 1)


@pytest.mark.parametrize("whole", [True, False])
def test_a_single_text_is_masked_in_part(whole):
  plans = [spans_of([20], 1, whole, np.random.default_rng(seed)) for seed in range(500)]
  assert all(spans != ((1, 21),) for spans in plans)
  assert np.mean([len(spans) for spans in plans]) > 0.9
  assert spans_of([1], 8, whole, np.random.default_rng(0)) == ()


def covered_most(bounds, low, high):
  """Returns the part of [low, high) in the segment that has most of these tokens, as spans."""
  parts = [[t for t in range(start, end) if low <= t < high] for start, end in bounds]
  longest = max(parts, key=len)
  return ((longest[0], longest[-1] + 1),) if longest else ()


def test_a_free_span_is_where_two_uniform_points_cover_most_of_a_segment():
  """The frequencies of spans in 8,000 draws match an enumeration of all pairs of points."""
  lengths = [6, 2, 3]
  bounds, points = bounds_of(lengths), range(sum(lengths) + len(lengths) + 2)
  pairs = itertools.product(points, repeat=2)
  expected = Counter(covered_most(bounds, min(pair), max(pair)) for pair in pairs)
  rng = np.random.default_rng(0)
  found = Counter(spans_of(lengths, 1, False, rng) for _ in range(8_000))
  assert found.keys() == expected.keys()
  for spans, count in expected.items():
    assert found[spans] / 8_000 == pytest.approx(count / len(points) ** 2, abs=0.015), spans


def test_undo_refuses_an_infill_that_is_cut():
  tokens = np.array([EOS, M0, BRK, 291, EOS, M0, 77, 78], np.int32)
  with refused(ValueError, "<mask:0>", "<eoss>"):
    cm3.undo_cm3_mask(tokens, VOCAB)
  with refused(ValueError, "<mask:0>", "only once"):
    cm3.undo_cm3_mask(tokens[:5], VOCAB)
