import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.rows.cm3 import apply_cm3_mask
from cm3leon_jax.decoding import grammar
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.grammar import (
  CODES,
  DOCUMENT,
  END,
  EOSS,
  MASK,
  TEXT,
  Part,
)
from cm3leon_jax.decoding.request import Hole
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.tasks import document_segments
from cm3leon_jax.templates import AFTER_IMAGE, IN_TEXT, SEGMENT_START
from cm3leon_jax.vocab import VocabLayout
from tests.refusals import refused

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=56)
IMAGE = 4
EOS, BRK, EOSS_ID = VOCAB.eos, VOCAB.brk, VOCAB.eoss
M0, M1 = VOCAB.mask(0), VOCAB.mask(1)
PICTURE = [271, 272, 273, 274]
DRAWN = (Part(CODES, IMAGE), Part(END))


def streams(request):
  return [s.tolist() for s in request.streams]


def test_text_to_image():
  request = request_lib.text_to_image(VOCAB, IMAGE, [17, 18], [([15, 16], PICTURE)])
  assert streams(request) == [[EOS, 15, 16, BRK, *PICTURE, BRK, 17, 18, BRK], [EOS, M0, BRK]]
  assert request.plan == DRAWN
  assert request.positions == 12 + IMAGE + 1
  kept = request_lib.text_to_image(
    VOCAB, IMAGE, [17, 18], [([15, 16], PICTURE)], keep_neighbors=True
  )
  assert streams(kept)[1] == [EOS, 15, 16, BRK, *PICTURE, BRK, M0, BRK]
  assert streams(request_lib.unconditional(VOCAB, IMAGE)) == [[EOS, M0, BRK]]
  assert request_lib.unconditional(VOCAB, IMAGE).plan == DRAWN


def test_edit():
  request = request_lib.edit(VOCAB, IMAGE, [15], PICTURE, [17])
  start = [EOS, 15, BRK, *PICTURE, BRK]
  assert streams(request) == [[*start, 17, BRK], start, [EOS, M0, BRK]]
  assert request.plan == DRAWN
  first = request_lib.edit(VOCAB, IMAGE, [15], PICTURE, [17], instruction_first=True)
  asked = [EOS, 15, BRK, 17, BRK, *PICTURE, BRK]
  assert streams(first) == [asked, start, [EOS, M0, BRK]]


def test_infill():
  request = request_lib.infill(VOCAB, IMAGE, [([17, 18],), ([271], Hole(codes=2), [274])])
  assert streams(request) == [
    [EOS, 17, 18, BRK, 271, M0, 274, EOS, M0],
    [EOS, 271, M0, 274, EOS, M0],
  ]
  assert request.plan == (Part(CODES, 2), Part(EOSS))
  caption = request_lib.infill(VOCAB, IMAGE, [(Hole(most_text=9),), (PICTURE,)], [([15],)])
  assert streams(caption) == [[EOS, 15, BRK, M0, BRK, *PICTURE, EOS, M0]]
  assert caption.plan == (Part(TEXT, 9),)
  several = request_lib.infill(VOCAB, IMAGE, [([17], Hole(most_text=3)), (Hole(codes=3), [274])])
  assert streams(several) == [[EOS, 17, M0, BRK, M1, 274, EOS, M0]]
  assert several.plan == (Part(TEXT, 3), Part(MASK, 1), Part(CODES, 3), Part(EOSS))


def test_the_unconditional_stream_of_an_infill_numbers_its_holes_as_training_does():
  """Given two holes in an image between texts, the unconditional stream has only the image."""
  image = ([271], Hole(codes=1), [273], Hole(codes=1))
  document = [([17, 18],), image, ([19],)]
  request = request_lib.infill(VOCAB, IMAGE, document, [([15], PICTURE)])
  tokens = np.array([EOS, *PICTURE, EOS], np.int32)
  trained = apply_cm3_mask(tokens, [(2, 3), (4, 5)], VOCAB)
  answer = [PICTURE[1], EOSS_ID, M1, PICTURE[3], EOSS_ID]
  assert [*request.streams[1], *answer] == trained.tolist()
  assert request.plan == request_lib.infill(VOCAB, IMAGE, [image]).plan


def test_prompts_of_the_template_chameleon():
  """`</s>` starts a sample, `<break>` an image, `<image_end>` ends it, `<eoss>` ends a turn."""
  vocab, neighbors = VocabLayout(8, 264, 56, "chameleon"), [([15, 16], PICTURE)]
  E, B, S, Z, M = vocab.eos, vocab.brk, vocab.eoss, vocab.image_end, vocab.mask(0)
  image = [B, *PICTURE, Z]
  made = {
    "image": request_lib.text_to_image(vocab, IMAGE, [17], neighbors),
    "kept": request_lib.text_to_image(vocab, IMAGE, [17], neighbors, True),
    "edit": request_lib.edit(vocab, IMAGE, [15], PICTURE, [17]),
    "instruct": request_lib.instruct(vocab, IMAGE, [[15], [16]]),
    "shown": request_lib.instruct(vocab, IMAGE, [[15], PICTURE, [16]]),
    "caption": request_lib.continuation(vocab, IMAGE, [PICTURE, [17]], 9, neighbors),
    "infill": request_lib.infill(vocab, IMAGE, [([17],), ([271], Hole(codes=2), [274])]),
    "text": request_lib.infill(vocab, IMAGE, [(Hole(most_text=9),), (PICTURE,)]),
    "document": request_lib.document(vocab, IMAGE, [[17], PICTURE], 9),
    "next": request_lib.document(vocab, IMAGE, [[17]], 9, after_break=True),
  }
  assert {name: streams(request) for name, request in made.items()} == {
    "image": [[E, 15, 16, *image, 17, S, B], [E, B]],
    "kept": [[E, 15, 16, *image, 17, S, B], [E, 15, 16, *image, B]],
    "edit": [[E, 15, *image, 17, S, B], [E, *image, B], [E, B]],
    "instruct": [[E, 15, S, 16, S, B], [E, B]],
    "shown": [[E, 15, *image, 16, S, B], [E, *image, B], [E, B]],
    "caption": [[E, 15, 16, *image, *image, 17, S]],
    "infill": [[E, 17, B, 271, M, 274, Z, M], [E, B, 271, M, 274, Z, M]],
    "text": [[E, M, *image, M]],
    "document": [[E, 17, B, *PICTURE]],
    "next": [[E, 17, S]],
  }
  assert made["caption"].plan == (Part(TEXT, 9),)
  assert made["document"].plan == (Part(DOCUMENT, 9, AFTER_IMAGE),)
  assert vocab.special_tokens()[-1] == "<image_end>"
  ids = np.array([Z, 18, B, *PICTURE, Z, 19, S])
  segments = document_segments(vocab, made["document"], ids)
  assert [s.tolist() for s in segments] == [[17], PICTURE, [18], PICTURE, [19]]
  filled = document_segments(vocab, made["infill"], np.array([272, 273, S]))
  assert [s.tolist() for s in filled] == [[17], PICTURE]


def test_document():
  cases = [
    ([], False, [EOS], SEGMENT_START),
    ([[17]], False, [EOS, 17], IN_TEXT),
    ([[17], PICTURE], False, [EOS, 17, BRK, *PICTURE], AFTER_IMAGE),
    ([[17], PICTURE], True, [EOS, 17, BRK, *PICTURE, BRK], SEGMENT_START),
  ]
  for segments, after_break, prompt, place in cases:
    request = request_lib.document(VOCAB, IMAGE, segments, 9, after_break)
    assert streams(request) == [prompt]
    assert request.plan == (Part(DOCUMENT, 9, place),)
    assert request.positions == len(prompt) + 9


def test_weights_of_the_streams():
  """Weights have a row per code of an image; other tokens use one row, equal to the last code's."""
  sampling = SamplingConfig(
    guidance=3.0, guidance_schedule="linear", image_guidance=1.5, edit_guidance=7.5
  )
  image, alone = request_lib.text_to_image(VOCAB, 3, [17]), request_lib.unconditional(VOCAB, 3)
  edit = request_lib.edit(VOCAB, 4, [15], PICTURE, [17])
  np.testing.assert_array_equal(alone.guidance_weights(sampling, 3), np.ones((4, 1)))
  np.testing.assert_array_equal(
    image.guidance_weights(sampling, 3), [[1, 0], [2, -1], [3, -2], [3, -2]]
  )
  weights = edit.guidance_weights(sampling, 4)
  np.testing.assert_allclose(weights[[0, 3, 4]], [[1, 0, 0], [7.5, -6, -0.5], [7.5, -6, -0.5]])
  np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


@st.composite
def documents(draw):
  """Draws (segments, the segments with one or two holes, the spans of the holes)."""
  texts = st.lists(st.integers(8, 263), min_size=1, max_size=5)
  images = st.lists(st.integers(264, 319), min_size=IMAGE, max_size=IMAGE)
  segments = draw(st.lists(st.one_of(texts, images), min_size=1, max_size=4))
  chosen = draw(st.sets(st.integers(0, len(segments) - 1), min_size=1, max_size=2))
  holed, spans, offset = [], [], 1
  for i, segment in enumerate(segments):
    if i in chosen:
      start = draw(st.integers(0, len(segment) - 1))
      stop = draw(st.integers(start + 1, len(segment)))
      image = segment[0] >= VOCAB.text_size
      more = 0 if image else draw(st.integers(0, 2))
      hole = Hole(codes=stop - start) if image else Hole(most_text=stop - start + more)
      holed.append([p for p in (segment[:start], hole, segment[stop:]) if isinstance(p, Hole) or p])
      spans.append((offset + start, offset + stop))
    else:
      holed.append([segment])
    offset += len(segment) + 1
  return segments, holed, spans


@settings(max_examples=100, deadline=None)
@given(documents())
def test_an_infill_with_its_answer_is_the_document_as_cm3_trained_it(made):
  segments, holed, spans = made
  joined = [[VOCAB.eos, *segments[0]], *([VOCAB.brk, *s] for s in segments[1:]), [VOCAB.eos]]
  tokens = np.array(list(itertools.chain.from_iterable(joined)), np.int32)
  request, trained = request_lib.infill(VOCAB, IMAGE, holed), apply_cm3_mask(tokens, spans, VOCAB)
  prompt, answer = np.split(trained, [len(request.streams[0])])
  np.testing.assert_array_equal(request.streams[0], prompt)
  assert len(answer) <= grammar.max_new_tokens(request.plan)
  assert [s.tolist() for s in document_segments(VOCAB, request, answer)] == segments
  # Negative control: a changed answer gives another document.
  answer[0] += 1 if answer[0] != 263 else -1
  assert [s.tolist() for s in document_segments(VOCAB, request, answer)] != segments


@pytest.mark.parametrize("end", [EOS, BRK])
def test_segments_of_what_is_no_infill(end):
  def found(request, ids):
    return [s.tolist() for s in document_segments(VOCAB, request, np.array(ids))]

  image = request_lib.text_to_image(VOCAB, IMAGE, [17, 18], [([15], PICTURE)])
  assert found(image, [*PICTURE[::-1], end]) == [[15], PICTURE, [17, 18], PICTURE[::-1]]
  edit = request_lib.edit(VOCAB, IMAGE, [15], PICTURE, [17])
  assert found(edit, [*PICTURE[::-1], end]) == [[15], PICTURE, [17], PICTURE[::-1]]
  continued = request_lib.document(VOCAB, IMAGE, [PICTURE, [17]], 9)
  assert found(continued, [18, BRK, *PICTURE, EOS]) == [PICTURE, [17, 18], PICTURE]
  assert found(request_lib.document(VOCAB, IMAGE, [], 9), [18, EOS]) == [[18]]
  caption = request_lib.infill(VOCAB, IMAGE, [(Hole(most_text=9),), (PICTURE,)], [([15],)])
  assert found(caption, [17, EOSS_ID]) == [[15], [17], PICTURE]


TEXT_HOLE, IMAGE_HOLE = Hole(most_text=2), Hole(codes=IMAGE)


@pytest.mark.parametrize(
  ("make", "fact"),
  [
    (lambda: request_lib.text_to_image(VOCAB, IMAGE, []), "empty"),
    (lambda: request_lib.edit(VOCAB, IMAGE, [15], PICTURE[:3], [17]), "3 codes"),
    (lambda: request_lib.infill(VOCAB, IMAGE, [([17],)]), "no mask"),
    (lambda: request_lib.infill(VOCAB, IMAGE, [([17], TEXT_HOLE)] * 3), "3 masks"),
    (lambda: request_lib.infill(VOCAB, IMAGE, [([17], Hole(codes=2))]), "mixes"),
    (lambda: request_lib.infill(VOCAB, IMAGE, [([17], TEXT_HOLE, TEXT_HOLE)]), "adjacent"),
    (lambda: request_lib.infill(VOCAB, IMAGE, [([271], IMAGE_HOLE)]), "5 codes"),
    (lambda: request_lib.infill(VOCAB, IMAGE, [([17, 271], TEXT_HOLE)]), "mixes"),
    (lambda: request_lib.document(VOCAB, IMAGE, [[17]], 1), "length is 1"),
  ],
)
def test_bad_requests(make, fact):
  with refused(UserError, fact):
    make()
