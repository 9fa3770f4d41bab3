"""What prompts share is found and read once, and every row can be put together again."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.decoding import batch

PAD = 0


@pytest.fixture(autouse=True, scope="module")
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batch, "BUCKET", 4)
    patch.setattr(batch, "SHARED", 3)
    yield


def test_rounded():
  assert [batch.rounded(n, 1) for n in (1, 2, 3, 5, 8, 9, 16, 17)] == [1, 2, 4, 8, 8, 16, 16, 24]
  assert [batch.rounded(n, 8) for n in (1, 8, 9, 17)] == [8, 8, 16, 32]
  assert [batch.rounded(n, 3) for n in (1, 4, 7)] == [3, 6, 12]


def test_pad_left():
  tokens, valid = batch.pad_left([np.array([7]), np.array([8, 9, 10])], 3, PAD)
  np.testing.assert_array_equal(tokens, [[0, 0, 0, 7], [0, 8, 9, 10], [0, 0, 0, 0]])
  np.testing.assert_array_equal(valid, [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
  assert batch.pad_left([np.array([], np.int32)], 1, PAD)[0].shape == (1, 4)


@pytest.mark.parametrize(
  ("prompts", "lengths"),
  [
    ([[1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 5]], [3, 0, 3]),
    ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 9]], [3, 3, 3]),
    ([[1, 2, 3], [1, 2, 3, 4]], [3, 3]),  # One is the beginning of the other.
    ([[1, 2, 4], [1, 2, 3]], [0, 0]),  # Two tokens are too few.
    ([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 5], [5, 6, 7, 8, 9]], [3, 4, 3, 4]),
    ([[], [1]], [0, 0]),
  ],
)
def test_shared_prefixes(prompts, lengths):
  assert batch.shared_prefixes([np.array(p, np.int32) for p in prompts]) == lengths


# Few letters and beginnings, so that much is shared.
beginnings = st.sampled_from([[], [5, 6], [5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 8, 1, 1]])
some_prompts = st.lists(
  st.builds(lambda a, b: [*a, *b], beginnings, st.lists(st.integers(1, 3), min_size=1, max_size=6)),
  min_size=1,
  max_size=9,
)


@settings(max_examples=200, deadline=None)
@given(some_prompts, st.sampled_from([1, 2, 8]))
def test_every_row_can_be_put_together(rows, multiple):
  made = batch.prompt_arrays([np.array(r, np.int32) for r in rows], PAD, multiple)
  unique = {tuple(r[:-1]) for r in rows}
  arrays = [made.rests] if made.prefixes is None else [made.prefixes, made.rests]
  for tokens, valid in arrays:
    assert tokens.shape == valid.shape
    assert tokens.dtype == np.int32
    assert len(tokens) % multiple == 0
    assert tokens.shape[1] % batch.BUCKET == 0
    assert (tokens[~valid] == PAD).all()
    assert (np.diff(valid.astype(int), axis=1) >= 0).all()  # Padding is on the left.
  assert len(made.rests[0]) == batch.rounded(len(unique), multiple)
  for row, prompt in enumerate(rows):
    u = made.row[row]
    rest = made.rests[0][u][made.rests[1][u]].tolist()
    first = (
      []
      if made.prefixes is None
      else made.prefixes[0][made.prefix_of[u]][made.prefixes[1][made.prefix_of[u]]].tolist()
    )
    assert [*first, *rest, made.last[row]] == prompt
    assert len(first) == 0 or len(first) >= batch.SHARED
  # What is read in all is no more than without sharing, and each prefix serves several prompts.
  if made.prefixes is not None:
    used = made.prefix_of[: len(unique)]
    assert made.prefixes[1].sum() + made.rests[1].sum() < sum(map(len, unique))
    assert all((used == p).sum() > 1 for p in set(used) if made.prefixes[1][p].any())


def test_equal_prompts_are_read_once():
  """Samples of one request, and prompts that differ in nothing but the last token."""
  made = batch.prompt_arrays([np.array(p) for p in ([1, 2], [1, 2], [1, 3], [7, 2])], PAD, 1)
  assert made.prefixes is None
  assert made.row.tolist() == [0, 0, 0, 1]
  assert made.last.tolist() == [2, 2, 3, 2]
  assert made.rests[1].sum() == 2


def test_a_stream_of_short_prompts_needs_few_slots():
  """Two streams; a prompt with a shared beginning, whose slots are the first, needs all."""
  short, other = [7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9]
  made = batch.prompt_arrays(
    [np.array(p, np.int32) for p in (other, short, other[:6], short)], PAD, 1
  )
  assert made.prefixes is not None
  assert made.slots == 12
  assert batch.stream_widths(made, 2) == (12, 4)
  alone = batch.prompt_arrays([np.array(p, np.int32) for p in (other, short)], PAD, 1)
  assert batch.stream_widths(alone, 2) == (8, 4)
  assert batch.stream_widths(alone, 1) == (8,)
