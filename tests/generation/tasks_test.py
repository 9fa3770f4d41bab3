"""Each task's prompts are the documented templates, holes are where the user put them, and answers are read back."""

import dataclasses

import numpy as np
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.cm3 import undo_cm3_mask
from cm3leon_jax.decoding import tasks
from cm3leon_jax.decoding.asks import Ask
from cm3leon_jax.decoding.sampling import SamplingConfig
from tests.data.stores import VOCAB

CODES = np.arange(16, dtype=np.int32)
IDS = VOCAB.image_ids(CODES)


def infilled(request, ids):
  """The sample that training would have made it of, without its `</s>`."""
  whole = undo_cm3_mask(np.concatenate([request.streams[0], np.array(ids, np.int32)]), VOCAB)
  assert (whole[0], whole[-1]) == (VOCAB.eos, VOCAB.eos)
  return whole[1:-1].tolist()


def test_a_question_is_the_template_with_a_hole(form):
  request = tasks.make_request(form, Ask("question", "what is it?", "a.png"), CODES)
  filled = infilled(request, [*form.encode("an apple"), VOCAB.eoss])
  expected = [*form.encode("Question: what is it? Answer: an apple."), VOCAB.brk, *IDS]
  assert filled == expected
  answer = tasks.read_answer(
    form, Ask("question", "what is it?", "a.png"), request, np.array([*form.encode("an apple"), 4])
  )
  assert answer == tasks.Answer(("an apple",), ("an apple",))


def test_a_caption_is_the_first_segment(form):
  ask = Ask("caption", image="a.png", length=5)
  request = tasks.make_request(form, ask, CODES)
  ids = np.array([*form.encode("red apple"), VOCAB.eoss])
  assert infilled(request, ids) == [*form.encode("red apple"), VOCAB.brk, *IDS]
  assert tasks.read_answer(form, ask, request, ids) == tasks.Answer(("red apple",), ("red apple",))
  assert request.plan[0].count == 5


@pytest.mark.parametrize(
  ("text", "fills"),
  [
    ("a <mask> on the <mask>", ["red apple", "blue car"]),
    ("<mask> house.", ["old"]),
    ("it's <mask>; 3<mask>", ["new", "."]),
  ],
)
@pytest.mark.parametrize("image", ["", "a.png"])
def test_texts_with_masks_are_tokenized_as_if_filled(form, text, fills, image):
  ask = Ask("infill_text", text, image, length=20)
  request = tasks.make_request(form, ask, CODES)
  ids, whole = [], text
  for i, fill in enumerate(fills):
    tokens = form.encode("x" + fill)[len(form.encode("x")) :] if fill == "." else form.encode(fill)
    ids += [*([VOCAB.mask(i)] if i else []), *tokens, VOCAB.eoss]
    whole = whole.replace("<mask>", fill, 1)
  assert infilled(request, ids) == [*form.encode(whole), *([VOCAB.brk, *IDS] if image else [])]
  answer = tasks.read_answer(form, ask, request, np.array(ids))
  assert answer == tasks.Answer((whole,), tuple(fills))


def test_a_box_is_one_hole_a_row(form):
  ask = Ask("infill_image", "red apple", "a.png", box=(3, 0, 6, 4))
  request = tasks.make_request(form, ask, CODES)
  assert [tuple(part[:2]) for part in request.plan] == [(1, 2), (3, 0), (4, 1), (1, 2), (3, 0)]
  new = VOCAB.image_ids([60, 61, 62, 63])
  ids = np.array([*new[:2], VOCAB.eoss, VOCAB.mask(1), *new[2:], VOCAB.eoss], np.int32)
  (image,) = tasks.read_answer(form, ask, request, ids).images
  assert image.tolist() == [0, 60, 61, 3, 4, 62, 63, 7, *range(8, 16)]
  assert len(request.streams) == 2
  assert len(tasks.make_request(form, dataclasses.replace(ask, prompt=""), CODES).streams) == 1


def test_a_box_of_full_width_is_one_hole(form):
  request = tasks.make_request(form, Ask("infill_image", image="a.png", box=(0, 2, 8, 6)), CODES)
  assert [tuple(part[:2]) for part in request.plan] == [(1, 8), (3, 0)]
  whole = tasks.make_request(form, Ask("infill_image", image="a.png", box=(0, 0, 8, 8)), CODES)
  assert whole.plan[0].count == 16


def test_boxes_are_rounded_out():
  assert tasks.whole_codes((3, 0, 9, 4), 16, 8) == (1, 0, 5, 2)
  assert tasks.whole_codes((4, 4, 6, 6), 16, 8) == (2, 2, 3, 3)


@pytest.mark.parametrize(
  ("box", "sentence"),
  [
    ((0, 0, 9, 4), "box is 0,0,9,4; it must lie within the picture, 8 x 8 pixels."),
    ((-1, 0, 4, 4), "box is -1,0,4,4; it must lie within the picture, 8 x 8 pixels."),
    ((4, 0, 4, 4), "box is 4,0,4,4, which is empty: left must be less than right"),
    ((0, 4, 4, 2), "box is 0,4,4,2, which is empty: "),
    ((0, 4, 4), "box is 0,4,4; it must be four whole numbers: left, top, right, bottom in pixels."),
    ((0, 4, 4.5, 2), "box is 0,4,4.5,2; it must be four whole numbers"),
  ],
)
def test_wrong_boxes(form, box, sentence):
  with pytest.raises(UserError, match=f"^f, line 1: {sentence}"):
    tasks.make_request(form, Ask("infill_image", image="a.png", box=box, where="f, line 1"))


def test_a_box_of_more_rows_than_sentinels(form):
  few = dataclasses.replace(form, vocab=dataclasses.replace(VOCAB, num_special=7))
  with pytest.raises(
    UserError,
    match="box is 0,0,2,8: it has 4 rows of codes, and the vocabulary has sentinels for 1: make it",
  ):
    tasks.make_request(few, Ask("infill_image", image="a.png", box=(0, 0, 2, 8)))


def test_an_edit_is_the_template(form):
  request = tasks.make_request(form, Ask("edit", "blue car", "a.png"), CODES)
  start = [VOCAB.eos, *form.encode(tasks.EDIT), VOCAB.brk, *IDS, VOCAB.brk]
  assert [s.tolist() for s in request.streams] == [
    [*start, *form.encode("blue car"), VOCAB.brk],
    start,
    [VOCAB.eos, VOCAB.mask(0), VOCAB.brk],
  ]


def test_a_document_continues_its_text_and_fills_what_is_left(form):
  ask = Ask("interleaved", "red apple")
  request = tasks.make_request(form, ask)
  assert request.streams[0].tolist() == [VOCAB.eos, *form.encode("red apple")]
  assert request.positions == form.positions
  assert tasks.make_request(form, dataclasses.replace(ask, prompt="", length=7)).positions == 8
  ids = np.array(
    [*form.encode("on"), VOCAB.brk, *IDS, VOCAB.brk, *form.encode("new house"), VOCAB.eos]
  )
  text, image, last = tasks.read_answer(form, ask, request, ids).segments
  assert (text, last) == ("red apple on", "new house")
  np.testing.assert_array_equal(image, CODES)


@pytest.mark.parametrize(
  "ask",
  [
    Ask(prompt="car " * 120),
    Ask("infill_text", "car <mask>", length=125),
    Ask("interleaved", length=128),
  ],
)
def test_a_prompt_that_is_too_long(form, ask):
  ask = dataclasses.replace(ask, where="f, line 1")
  with pytest.raises(
    UserError,
    match=r"^f, line 1: the prompt has \d+ tokens and up to \d+ follow; the model was trained on 128",
  ):
    tasks.make_request(form, ask)


@pytest.mark.parametrize(
  "fields", [{"task": "unconditional"}, {"task": "interleaved", "prompt": "red apple"}]
)
def test_contrastive_decoding_needs_two_streams(form, fields):
  with pytest.raises(
    UserError,
    match=r"sampling\.method is 'mixture', which draws against a stream without the prompt",
  ):
    tasks.make_request(form, Ask(**fields, sampling=SamplingConfig(method="mixture")))
  for ask in (
    Ask(prompt="red apple"),
    Ask("edit", "blue", "a.png"),
    Ask("infill_text", "<mask>", length=9),
  ):
    tasks.make_request(
      form, dataclasses.replace(ask, sampling=SamplingConfig(method="contrastive"))
    )


def test_masks_side_by_side(form):
  with pytest.raises(UserError, match="two masks stand side by side"):
    tasks.make_request(form, Ask("infill_text", "a <mask> <mask>"))
