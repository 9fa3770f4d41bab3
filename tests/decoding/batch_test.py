import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.decoding import batch, request
from cm3leon_jax.positions import positions_of
from tests.decoding.small import CODES, IMAGE, VOCAB

PAD = 0


@pytest.fixture(autouse=True, scope="module")
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batch, "BUCKET", 4)
    patch.setattr(batch, "SHARED", 3)
    yield


def plain_arrays(rows, shards=1):
  """Returns the arrays of prompts with positions 0, 1, 2, ..."""
  rows = [np.array(r, np.int32) for r in rows]
  read = [batch.StreamPrompt.of(r, np.arange(len(r) + 1)) for r in rows]
  return batch.prompt_arrays(read, PAD, shards)


def pairs(ids, first=0):
  """Returns [T, 2] of (id, position); positions count from `first`."""
  return np.array([*zip(ids, itertools.count(first))], np.int32).reshape(-1, 2)


def test_rounded():
  assert [batch.rounded(n, 1) for n in (1, 2, 3, 5, 8, 9, 16, 17)] == [1, 2, 4, 8, 8, 16, 16, 24]
  assert [batch.rounded(n, 8) for n in (1, 8, 9, 17)] == [8, 8, 16, 32]
  assert [batch.rounded(n, 3) for n in (1, 4, 7)] == [3, 6, 12]


def test_pad_left():
  prompts = [pairs([7]), pairs([8, 9, 10], -2)]
  tokens, valid, positions = batch.pad_left([*prompts, pairs([])], PAD)
  np.testing.assert_array_equal(tokens, [[0, 0, 0, 7], [0, 8, 9, 10], [0, 0, 0, 0]])
  np.testing.assert_array_equal(valid, [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
  np.testing.assert_array_equal(positions, [[0, 0, 0, 0], [0, -2, -1, 0], [0, 0, 0, 0]])
  assert batch.pad_left([pairs([])], PAD).ids.shape == (1, 4)


@pytest.mark.parametrize(
  ("prompts", "lengths"),
  [
    ([[1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 5]], [3, 0, 3]),
    ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 9]], [3, 3, 3]),
    ([[1, 2, 3], [1, 2, 3, 4]], [3, 3]),  # The first prompt is a prefix of the second.
    ([[1, 2, 4], [1, 2, 3]], [0, 0]),  # A common prefix of two tokens is too short to be shared.
    ([[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 5], [5, 6, 7, 8, 9]], [3, 4, 3, 4]),
    ([[], [1]], [0, 0]),
  ],
)
def test_shared_prefixes(prompts, lengths):
  assert batch.shared_prefixes([pairs(p) for p in prompts]) == lengths


def test_tokens_at_other_positions_are_not_shared():
  """Two aligned prompts start with the same neighbor, so only its tokens have equal positions."""
  neighbor = [*pairs([1, 5, 6, 7], -1)]
  long, short, other = ([*neighbor, *pairs([8, 8, 8, 9], -n)] for n in (4, 3, 4))
  other[-1] = pairs([7], 7)[0]
  prompts = [np.stack(p) for p in (long, short, long, other)]
  assert batch.shared_prefixes([prompts[0], prompts[1]]) == [4, 4]
  assert batch.shared_prefixes([prompts[0], prompts[3]]) == [7, 7]
  ids = [p[:, 0] for p in prompts[:3]]
  positions = [np.append(p[:, 1], p[-1, 1] + 1) for p in prompts[:3]]
  read = [batch.StreamPrompt.of(*prompt) for prompt in zip(ids, positions)]
  made = batch.prompt_arrays(read, PAD, 1)
  assert made.row.tolist() == [0, 1, 0]
  assert made.prefixes.valid.sum() == 4
  assert made.prefixes.positions[0].tolist() == [-1, 0, 1, 2]
  assert made.rests.positions.tolist() == [[0, -4, -3, -2], [0, -3, -2, -1]]
  assert made.last_positions.tolist() == [-1, 0, -1]
  assert made.next_positions.tolist() == [0, 1, 0]


def test_positions_of_a_prompt_are_those_of_training():
  """Before codes, a prompt has the positions of the finished sample; before text, they continue."""
  caption, neighbor = np.array([20, 21, 22]), ([30], CODES)
  image = request.text_to_image(VOCAB, IMAGE, caption, [neighbor])
  hole = request.infill(VOCAB, IMAGE, [(caption,), (request.Hole(codes=2), CODES[2:])], [neighbor])
  after = [CODES[0], CODES[1]]
  edit = request.edit(VOCAB, IMAGE, caption, CODES, [20])
  for made in (image, hole, edit, request.unconditional(VOCAB, IMAGE)):
    for stream in made.streams:
      whole = positions_of([*stream, *after], VOCAB, True)
      found = batch.prompt_positions(stream, made.plan, VOCAB, True)
      np.testing.assert_array_equal(found, whole[: len(stream) + 1])
      plain = batch.prompt_positions(stream, made.plan, VOCAB, False)
      np.testing.assert_array_equal(plain, np.arange(len(stream) + 1))
  assert batch.prompt_positions(image.streams[0], image.plan, VOCAB, True)[-5:].tolist() == [
    *range(-4, 1)
  ]
  # The input image ends a unit, so the first code of the output image has position 0 again.
  assert batch.prompt_positions(edit.streams[1], edit.plan, VOCAB, True)[-2:].tolist() == [IMAGE, 0]
  caption_of = request.infill(VOCAB, IMAGE, [(request.Hole(most_text=9),), (CODES,)])
  [stream] = caption_of.streams
  found = batch.prompt_positions(stream, caption_of.plan, VOCAB, True)
  assert found.tolist() == [*range(-3, IMAGE + 3)]


# Few different ids and beginnings, so that prompts often share prefixes.
beginnings = st.sampled_from([[], [5, 6], [5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 8, 1, 1]])
some_prompts = st.lists(
  st.builds(lambda a, b: [*a, *b], beginnings, st.lists(st.integers(1, 3), min_size=1, max_size=6)),
  min_size=1,
  max_size=9,
)


@settings(max_examples=200, deadline=None)
@given(some_prompts, st.sampled_from([1, 2, 8]))
def test_every_row_can_be_put_together(some, shards):
  rows = [some[i % len(some)] for i in range(batch.rounded(len(some), shards))]
  made, size = plain_arrays(rows, shards), len(rows) // shards
  parts = [rows[i : i + size] for i in range(0, len(rows), size)]
  unique = [{tuple(r[:-1]) for r in part} for part in parts]
  arrays = [made.rests] if made.prefixes is None else [made.prefixes, made.rests]
  for tokens, valid, positions in arrays:
    assert positions.shape == valid.shape
    assert tokens.shape == valid.shape
    assert tokens.dtype == np.int32
    assert len(tokens) % shards == 0
    assert tokens.shape[1] % batch.BUCKET == 0
    assert (tokens[~valid] == PAD).all()
    assert (np.diff(valid.astype(int), axis=1) >= 0).all()  # Padding is on the left.
  of_shard = batch.rounded(max(map(len, unique)), 1)
  assert len(made.rests[0]) == shards * of_shard
  # Each shard uses only prefixes of its own, so devices exchange nothing.
  assert (made.row // of_shard == np.arange(len(rows)) // size).all()
  if made.prefixes is not None:
    prefixes = len(made.prefixes[0]) // shards
    assert (made.prefix_of // prefixes == np.arange(len(made.prefix_of)) // of_shard).all()
  for row, prompt in enumerate(rows):
    u = made.row[row]
    rest = made.rests[0][u][made.rests[1][u]].tolist()
    first = []
    if made.prefixes is not None:
      ids, present = (x[made.prefix_of[u]] for x in made.prefixes[:2])
      first = ids[present].tolist()
    assert [*first, *rest, made.last[row]] == prompt
    at = made.rests.positions[u][made.rests.valid[u]]
    assert at.tolist() == [*range(len(first), len(prompt) - 1)]
    assert (made.last_positions[row], made.next_positions[row]) == (len(prompt) - 1, len(prompt))
    assert len(first) == 0 or len(first) >= batch.SHARED
  # Sharing reads fewer tokens in total, and at least two prompts use each prefix.
  if made.prefixes is not None:
    used = made.prefix_of
    assert made.prefixes[1].sum() + made.rests[1].sum() < sum(len(r) for u in unique for r in u)
    assert all((used == p).sum() > 1 for p in set(used) if made.prefixes[1][p].any())


def test_a_stream_of_short_prompts_needs_few_entries():
  """A stream of short prompts needs few cache entries. A shared prefix needs all of its entries."""
  short, other = [7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9]
  made = plain_arrays([other, short, other[:6], short])
  assert made.prefixes is not None
  assert made.entries == 12
  assert batch.stream_widths(made, 2) == (12, 4)
  alone = plain_arrays([other, short])
  assert batch.stream_widths(alone, 2) == (8, 4)
  assert batch.stream_widths(alone, 1) == (8,)
