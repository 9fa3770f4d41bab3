import dataclasses

import numpy as np
import pytest

from cm3leon_jax.config.instructions import EDIT
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.rows.cm3 import undo_cm3_mask
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.image_tasks import (
  Edit,
  InfillImage,
  TextToImage,
  Unconditional,
)
from cm3leon_jax.generation.text_tasks import (
  Caption,
  InfillText,
  Interleaved,
  Question,
)
from tests.data.stores import VOCAB
from tests.refusals import refused

CODES = np.arange(16, dtype=np.int32)
IDS = VOCAB.image_ids(CODES)


def infilled(request, ids):
  """Returns the document of a prompt and its generated ids, in order and without `</s>`."""
  whole = undo_cm3_mask(np.concatenate([request.streams[0], np.array(ids, np.int32)]), VOCAB)
  assert (whole[0], whole[-1]) == (VOCAB.eos, VOCAB.eos)
  return whole[1:-1].tolist()


def test_a_question_is_the_template_with_a_hole(layout):
  task = Question("a.png", "what is it?")
  request = task.to_request(layout, CODES)
  filled = infilled(request, [*layout.encode("an apple"), VOCAB.eoss])
  expected = [*layout.encode("Question: what is it? Answer: an apple."), VOCAB.brk, *IDS]
  assert filled == expected
  ids = np.array([*layout.encode("an apple"), VOCAB.eoss])
  assert task.from_ids(layout, request, ids) == (("an apple",), ("an apple",))


def test_texts_follow_their_image_with_the_template_chameleon(layout):
  vocab = dataclasses.replace(VOCAB, template="chameleon")
  layout = dataclasses.replace(layout, vocab=vocab)
  image = [vocab.eos, vocab.brk, *IDS, vocab.image_end]
  caption, question = Caption("a.png"), Question("a.png", "what is it?")
  request = caption.to_request(layout, CODES)
  assert [s.tolist() for s in request.streams] == [image]
  asked = question.to_request(layout, CODES)
  assert asked.streams[0].tolist() == [*image, *layout.encode("what is it?"), vocab.eoss]
  ids = np.array([*layout.encode("an apple"), vocab.eoss])
  for task, made in ((caption, request), (question, asked)):
    assert task.from_ids(layout, made, ids) == (("an apple",), ("an apple",))


@pytest.mark.parametrize(
  "task", [TextToImage, Edit, Question, InfillText, Interleaved], ids=lambda task: task.name
)
def test_a_prompt_of_too_many_characters_is_refused_before_it_is_encoded(layout, task):
  def encode(text):
    raise AssertionError(f"{len(text)} characters were encoded")

  bounded = dataclasses.replace(layout, encode=encode)
  most = bounded.most_characters
  assert most == layout.positions * max(layout.longest_token, len("<break>"))
  given = {"image": "a.png"} if "image" in task.required else {}
  with refused(UserError, "characters"):
    task(prompt="<mask>" + "a" * (most - 5), **given).to_request(bounded, CODES)
  with pytest.raises(AssertionError, match="characters were encoded"):
    task(prompt="<mask>" + "a" * (most - 6), **given).to_request(bounded, CODES)


@pytest.mark.parametrize(
  ("text", "fills"),
  [
    ("a <mask> on the <mask>", ["red apple", "blue car"]),
    ("<mask> house.", ["old"]),
    ("it's <mask>; 3<mask>", ["new", "."]),
  ],
)
@pytest.mark.parametrize("image", ["", "a.png"])
def test_texts_with_masks_are_tokenized_as_if_filled(layout, text, fills, image):
  task = InfillText(text, image, length=20)
  request = task.to_request(layout, CODES)
  ids, whole = [], text
  for i, fill in enumerate(fills):
    tokens = (
      layout.encode("x" + fill)[len(layout.encode("x")) :] if fill == "." else layout.encode(fill)
    )
    ids += [*([VOCAB.mask(i)] if i else []), *tokens, VOCAB.eoss]
    whole = whole.replace("<mask>", fill, 1)
  assert infilled(request, ids) == [*layout.encode(whole), *([VOCAB.brk, *IDS] if image else [])]
  assert task.from_ids(layout, request, np.array(ids)) == ((whole,), tuple(fills))


def test_a_box_is_one_hole_per_row(layout):
  task = InfillImage("a.png", (3, 0, 6, 4), "red apple")
  request = task.to_request(layout, CODES)
  assert [tuple(part[:2]) for part in request.plan] == [(1, 2), (3, 0), (4, 1), (1, 2), (3, 0)]
  new = VOCAB.image_ids([60, 61, 62, 63])
  ids = np.array([*new[:2], VOCAB.eoss, VOCAB.mask(1), *new[2:], VOCAB.eoss], np.int32)
  (image,), _ = task.from_ids(layout, request, ids)
  assert image.tolist() == [0, 60, 61, 3, 4, 62, 63, 7, *range(8, 16)]
  assert len(request.streams) == 2
  without = dataclasses.replace(task, prompt="").to_request(layout, CODES)
  assert len(without.streams) == 1
  # The unconditional stream equals the request without a prompt.
  np.testing.assert_array_equal(request.streams[1], without.streams[0])


MIXTURE, CONTRASTIVE = (SamplingConfig(method=method) for method in ("mixture", "contrastive"))
BOXES = [(0, 0, 9, 4), (-1, 0, 4, 4), (4, 0, 4, 4), (0, 4, 4, 2), (0, 4, 4), (0, 4, 4.5, 2)]
REFUSED = [
  *((InfillImage("a.png", box), "box is") for box in BOXES),
  (InfillImage("a.png", (0, 0, 2, 8)), "4 rows"),  # The layout below has two sentinels of masks.
  (TextToImage("car " * 120), "128 positions"),
  (InfillText("car <mask>", length=125), "128 positions"),
  (Interleaved(length=128), "128 positions"),
  (InfillText("a <mask> <mask>"), "mask"),
  (Unconditional(sampling=MIXTURE), "'mixture'"),
  (Interleaved("red apple", sampling=MIXTURE), "'mixture'"),
]


@pytest.mark.parametrize(("task", "fact"), REFUSED)
def test_what_is_no_request_is_refused_with_its_line(layout, task, fact):
  if fact == "4 rows":
    layout = dataclasses.replace(layout, vocab=dataclasses.replace(VOCAB, num_special=7))
  with refused(UserError, "f, line 1", fact):
    dataclasses.replace(task, where="f, line 1").to_request(layout)


def test_contrastive_decoding_takes_two_streams(layout):
  TextToImage("red apple", sampling=CONTRASTIVE).to_request(layout)
  Edit("a.png", "blue", sampling=CONTRASTIVE).to_request(layout)
  InfillText("<mask>", length=9, sampling=CONTRASTIVE).to_request(layout)


def test_an_edit_is_the_template(layout):
  request = Edit("a.png", "blue car").to_request(layout, CODES)
  start = [VOCAB.eos, *layout.encode(EDIT), VOCAB.brk, *IDS, VOCAB.brk]
  assert [s.tolist() for s in request.streams] == [
    [*start, *layout.encode("blue car"), VOCAB.brk],
    start,
    [VOCAB.eos, VOCAB.mask(0), VOCAB.brk],
  ]


def test_an_interleaved_document_continues_its_text_and_fills_the_row(layout):
  task = Interleaved("red apple")
  request = task.to_request(layout)
  assert request.streams[0].tolist() == [VOCAB.eos, *layout.encode("red apple")]
  assert request.positions == layout.positions
  assert Interleaved(length=7).to_request(layout).positions == 8
  ids = np.array(
    [*layout.encode("on"), VOCAB.brk, *IDS, VOCAB.brk, *layout.encode("new house"), VOCAB.eos]
  )
  (text, image, last), _ = task.from_ids(layout, request, ids)
  assert (text, last) == ("red apple on", "new house")
  np.testing.assert_array_equal(image, CODES)
