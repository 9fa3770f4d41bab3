"""Tests that positions count from a sample's images, and increase by one within a unit."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax import templates
from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.data.rows.loader import join
from cm3leon_jax.positions import positions_of
from cm3leon_jax.vocab import VocabLayout

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=16)
E, B, S, M0, M1 = VOCAB.eos, VOCAB.brk, VOCAB.eoss, VOCAB.mask(0), VOCAB.mask(1)
A, W, X, Y, Z = 20, 21, 22, 23, 24  # Text.
P, Q, R, T = (int(VOCAB.image_ids(i)) for i in range(4))


@pytest.mark.parametrize(
  ("tokens", "expected"),
  [
    ([E, A, W, X, E], [0, 1, 2, 3, 4]),  # A text
    ([E, A, B, P, Q, E], [-3, -2, -1, 0, 1, 2]),
    (
      [E, A, B, P, Q, B, W, X, B, R, T, E],  # A neighbor and a pair
      [-3, -2, -1, 0, 1, 2, -3, -2, -1, 0, 1, 2],
    ),
    ([E, M0, B, P, Q, E, M0, A, W, S], [-3, -2, -1, 0, 1, 2, 3, 4, 5, 6]),  # A masked caption
    ([E, A, B, M0, E, M0, P, Q, S], [-5, -4, -3, -2, -1, 0, 1, 2, 3]),  # A masked image
    ([E, A, B, M0, Q, E, M0, P, S], [-3, -2, -1, 0, 1, 2, 3, 4, 5]),  # A masked first code
    ([E, A, B, P, M0, E, M0, Q, S], [-3, -2, -1, 0, 1, 2, 3, 4, 5]),  # A masked last code
    (
      [E, A, B, P, Q, B, W, X, B, M0, T, E, M0, R, S],  # A masked first code after a neighbor
      [-3, -2, -1, 0, 1, 2, -3, -2, -1, 0, 1, 2, 3, 4, 5],
    ),
    ([E, P, Q, B, A, B, R, T, E], [-1, 0, 1, 2, -2, -1, 0, 1, 2]),  # An image first
    ([E, P, Q, B, R, T, B, A, E], [-1, 0, 1, 2, 0, 1, 2, 3, 4]),  # Two images, then a text
    ([E, P, Q, B, A, B, W, E], [-1, 0, 1, 2, 3, 4, 5, 6]),  # An image, then two texts
    ([E, M0, B, P, Q, E], [-3, -2, -1, 0, 1, 2]),  # A dropped condition
    ([E, P, B], [-1, 0, 1]),
    ([E], [0]),
    ([], []),
  ],
)
def test_literals(tokens, expected):
  positions = positions_of(np.array(tokens, np.int32), VOCAB, align_images=True)
  assert positions.dtype == np.int32
  assert positions.tolist() == expected
  plain = positions_of(tokens, VOCAB, align_images=False)
  assert plain.tolist() == list(range(len(tokens)))


def document(kinds, rng):
  bounds = {True: (VOCAB.text_size, VOCAB.size), False: (VOCAB.num_special, VOCAB.text_size)}
  ids = (rng.integers(*bounds[image], 4 if image else n).astype(np.int32) for image, n in kinds)
  segments = tuple(Segment(image, x) for (image, _), x in zip(kinds, ids))
  return Document("d", segments, "s", "l", "a")


some_kinds = st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=4)
some_seeds = st.integers(0, 2**16)


@given(st.lists(some_kinds, min_size=1, max_size=3), st.integers(0, 3), some_seeds)
def test_no_position_is_larger_than_the_index(documents, num_spans, seed):
  """No position is below minus the length, and only a new unit interrupts steps of one."""
  rng = np.random.default_rng(seed)
  sample = join([document(kinds, rng) for kinds in documents], VOCAB)
  parts = [([4 if i else n for i, n in kinds], [i for i, _ in kinds]) for kinds in documents]
  bounds = templates.of(VOCAB).bounds(parts)
  spans = cm3.sample_spans(bounds, len(sample), num_spans, False, rng)
  tokens = cm3.apply_cm3_mask(sample, spans, VOCAB)
  positions = positions_of(tokens, VOCAB, True)
  assert (positions <= np.arange(len(tokens))).all()
  assert (positions >= -len(tokens)).all()
  jumps = np.flatnonzero(np.diff(positions) != 1)
  assert (tokens[jumps] == VOCAB.brk).all()
  assert VOCAB.is_image(tokens[jumps - 1]).all()
