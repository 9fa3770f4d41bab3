import dataclasses

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows import cm3, loader
from cm3leon_jax.reports import row_parts
from cm3leon_jax.reports.row_parts import RowPart
from tests.data.stores import VOCAB
from tests.refusals import refused

EOS, BRK, EOSS, MASK = VOCAB.eos, VOCAB.brk, VOCAB.eoss, VOCAB.mask(0)
A, B, C = (VOCAB.num_special + i for i in range(3))
P, Q, R, S = (int(VOCAB.image_ids(i)) for i in range(4))
# </s> a b <break> p <mask:0> s </s> <mask:0> q r <eoss>
TOKENS = np.array([EOS, A, B, BRK, P, MASK, S, EOS, MASK, Q, R, EOSS], np.int32)


def document(*segments, key="d"):
  parts = tuple(Segment(bool(VOCAB.is_image(ids[0])), np.array(ids, np.int32)) for ids in segments)
  return Document(key, parts, "test", "CC0-1.0", "nobody")


def make_row(*samples, length=24):
  return loader.pack_row(
    [(np.array(s, np.int32), np.ones(len(s), np.float32)) for s in samples], length, VOCAB
  )


def test_codes_that_the_decoder_does_not_see_are_shown_all_the_same():
  row = make_row(TOKENS)
  place = np.flatnonzero(VOCAB.is_image(row["inputs"]))[0]
  row["inputs"][place] = VOCAB.unk
  (sample,) = row_parts.split_row(row, VOCAB)
  np.testing.assert_array_equal(sample.tokens, TOKENS)
  text = np.flatnonzero(~VOCAB.is_image(row["inputs"]))[1]
  row["inputs"][text] = VOCAB.unk
  with refused(ValueError):
    row_parts.split_row(row, VOCAB)


def test_a_row_is_cut_into_its_samples():
  row = make_row(TOKENS, [EOS, C, EOS])
  first, second = row_parts.split_row(row, VOCAB)
  assert (first.segment_id, first.start, first.num_positions) == (1, 0, 11)
  assert (second.segment_id, second.start, second.num_positions) == (2, 11, 2)
  np.testing.assert_array_equal(first.tokens, TOKENS)
  np.testing.assert_array_equal(second.tokens, [EOS, C, EOS])
  np.testing.assert_array_equal(second.weights, [0, 1, 1])
  (alone,) = row_parts.split_row(make_row(TOKENS, length=11), VOCAB)  # A row without padding.
  np.testing.assert_array_equal(alone.tokens, TOKENS)


@pytest.mark.parametrize(
  ("name", "at", "value"),
  [
    ("segment_ids", 4, 2),
    ("segment_ids", 11, 3),
    ("segment_ids", 5, 0),
    ("positions", 12, 12),
    ("targets", 2, C),
    ("loss_weights", 2, np.nan),
    ("loss_weights", 2, -1),
    ("loss_weights", 20, 1),
    ("inputs", 23, A),
  ],
)
def test_a_wrongly_packed_row_is_refused(name, at, value):
  row = make_row(TOKENS, [EOS, C, EOS])
  row[name][at] = value
  with refused(ValueError):
    row_parts.split_row(row, VOCAB)


def test_parts_of_a_sample():
  assert row_parts.split_parts(TOKENS, VOCAB) == [
    RowPart("special", 0, 1, 0),
    RowPart("text", 1, 3, 0),
    RowPart("special", 3, 4, 0),
    RowPart("image", 4, 5, 1),
    RowPart("special", 5, 6, 1, 0),
    RowPart("image", 6, 7, 1),
    RowPart("special", 7, 8, 1),
    RowPart("special", 8, 9, 1, 0, True),
    RowPart("image", 9, 11, 1, 0, True),
    RowPart("special", 11, 12, 1, 0, True),
  ]


def test_restore_puts_moved_parts_back():
  parts = row_parts.split_parts(TOKENS, VOCAB)
  assert row_parts.restore(parts) == [[parts[1]], [parts[3], parts[8], parts[5]]]
  dropped = np.array([EOS, MASK, BRK, P, Q, EOS])
  parts = row_parts.split_parts(dropped, VOCAB)
  assert parts[1] == RowPart("special", 1, 2, 0, 0)
  assert row_parts.restore(parts) == [[], [RowPart("image", 3, 5, 1)]]
  assert row_parts.is_dropped(dropped, VOCAB)
  assert not row_parts.is_dropped(TOKENS, VOCAB)


@given(
  kinds=st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=5),
  num_spans=st.integers(0, 4),
  whole_segments=st.booleans(),
  seed=st.integers(0, 99),
)
def test_restore_returns_every_segment_whole(kinds, num_spans, whole_segments, seed):
  rng = np.random.default_rng(seed)
  bounds = {True: (VOCAB.text_size, VOCAB.size), False: (VOCAB.num_special, VOCAB.text_size)}
  whole = document(*(rng.integers(*bounds[image], n) for image, n in kinds))
  spans = cm3.sample_spans([n for _, n in kinds], num_spans, whole_segments, rng)
  tokens = cm3.apply_cm3_mask(loader.join([whole], VOCAB), spans, VOCAB)
  parts = row_parts.split_parts(tokens, VOCAB)
  assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
  assert parts[-1].stop == len(tokens)
  found = [
    np.concatenate([tokens[p.start : p.stop] for p in segment])
    for segment in row_parts.restore(parts)
  ]
  assert [f.tolist() for f in found] == [s.tokens.tolist() for s in whole.segments]
  assert {p.span for p in parts if p.moved} == set(range(len(spans)))
  assert row_parts.check_sample(tokens, [whole], VOCAB, 99) == 0


def test_check_sample_compares_a_sample_with_its_documents():
  neighbor, itself = document([A, B], [P, Q, R, S], key="n"), document([C], [S, R, Q, P])
  joined = loader.join([neighbor, itself], VOCAB)

  def check(tokens, length=99, documents=(neighbor, itself)):
    return row_parts.check_sample(np.asarray(tokens, np.int32), list(documents), VOCAB, length)

  assert check(joined) == 0
  assert check(joined[:-3], length=len(joined) - 4) == 3
  assert check([EOS, MASK, BRK, S, R, Q, P, EOS]) == 0
  with refused(ValueError):
    check(joined[:-3])
  with refused(ValueError):
    check(loader.join([itself, neighbor], VOCAB))
  with refused(ValueError):
    check([EOS, MASK, BRK, P, Q, R, S, EOS])
  assert check(TOKENS, documents=[document([A, B], [P, Q, R, S])]) == 0
  with refused(ValueError):
    check(TOKENS[:-1], documents=[document([A, B], [P, Q, R, S])])
  other = dataclasses.replace(itself, segments=itself.segments[:1])
  with refused(ValueError):
    check(joined, documents=(neighbor, other))
