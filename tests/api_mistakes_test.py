"""Mistakes in the arguments of a Python call: each is one sentence."""

import re

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import CM3Leon, UserError
from cm3leon_jax.checkpoints import reading
from cm3leon_jax.generation.image_tasks import Unconditional
from tests.api_test import IMAGE, model, run  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore:(this model|retrieve is) ")


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    ({"batch_size": 0}, "load has a wrong option: batch_size is 0; it must be positive."),
    (
      {"weight_dtype": "int4"},
      "load has a wrong option: weight_dtype is 'int4'; it must be one of",
    ),
    (
      {"batches": 4},
      "load has no option 'batches': its options are dtype, devices, .* batch_size,",
    ),
    ({"batch_size": "many"}, "batch_size is 'many'; it must be a whole number."),
    ({"show_progress": "yes"}, "show_progress is 'yes'; it must be True or False."),
    ({"mesh": "auto"}, "mesh is 'auto'; it must be a mesh of `mesh.create_mesh`."),
    ({"clip": "elsewhere"}, "clip is given, and .* has a CLIP of its own: leave it out."),
  ],
)
def test_wrong_options_of_load(run, options, sentence, monkeypatch):  # noqa: F811
  monkeypatch.setattr(reading, "load_params", None)  # Nothing is read before.
  with pytest.raises(UserError, match=sentence):
    CM3Leon.load(run, **options)


@pytest.mark.parametrize("value", [None, 5, b"", b"a", [], " "])
def test_what_is_no_folder_is_neither_loaded_nor_written(model, value):  # noqa: F811
  said = "must be the path of a folder."
  for call, name in ((CM3Leon.load, "workdir"), (model.save, "folder")):
    with pytest.raises(UserError, match=f"^{name} is .*; it {said}"):
      call(value)


@pytest.mark.parametrize("value", [None, "a bell", [5], [None], Unconditional()], ids=repr)
def test_what_is_no_list_of_tasks_is_one_sentence(model, value):  # noqa: F811
  for call in (model.sample, model.requests):
    with pytest.raises(UserError, match=r"^tasks is .*; it must be a list of tasks of"):
      call(value)


ARRAY = np.zeros((8, 8), np.float32)
EMPTY = np.zeros((0, 8, 3), np.uint8)
MISTAKES = [
  (lambda m: m.generate(5), "prompt has type int; it must be a text, or a list of texts."),
  (lambda m: m.generate(" "), "task text_to_image needs a prompt, and none is given."),
  (lambda m: m.generate("a", num_samples=0), "num_samples is 0; it must be at least 1."),
  (lambda m: m.generate("a", num_samples=1.5), "num_samples is 1.5; it must be a whole number."),
  (lambda m: m.generate("a", num_samples=True), "num_samples is True; it must be a whole number."),
  (lambda m: m.generate("a", num_samples=2, rank="no"), "rank is 'no'; it must be True or False."),
  (lambda m: m.generate("a", guidance=-1.0), "sampling.guidance is -1.0; it must be at least 0."),
  (lambda m: m.generate("a", seed=-1), "seed is -1; it must be at least 0."),
  (lambda m: m.generate("a", retrieve=65), "65 documents are asked for; at most config.retrieval."),
  (lambda m: m.generate("a", rank=True), "rank orders the samples of a prompt, and num_samples is"),
  (
    lambda m: m.generate("a", temprature=1.0),
    "task text_to_image reads no setting 'temprature': d",
  ),
  (
    lambda m: m.generate("a", temperature=0.0),
    "sampling.temperature is 0.0; it must be greater th",
  ),
  (lambda m: m.generate("a", text_top_k=3), "task text_to_image reads no setting 'text_top_k': di"),
  (
    lambda m: m.generate("a", guidance=3.0, method="contrastive"),
    "guidance is given, which sampling.method = 'contrastive' does not read: leave it out, or give",
  ),
  (
    lambda m: m.generate("a", contrastive_k=3),
    "contrastive_k is given, which sampling.method = 'top_p' does not read: leave it out, or give",
  ),
  (
    lambda m: m.generate("car " * 200),
    "the prompt has 203 tokens and up to 17 follow; the model w",
  ),
  (lambda m: m.caption(IMAGE, length=0), "length is 0; it must be at least 1."),
  (lambda m: m.caption(IMAGE, guidance=2.0), "task caption reads no setting 'guidance': its setti"),
  (lambda m: m.caption(EMPTY), "image has type uint8[0, 8, 3]; it must be a path, a PIL image, "),
  (lambda m: m.caption(Image.new("RGB", (0, 8))), "image has type Image of 0 x 8 pixels; it must"),
  (lambda m: m.caption("/"), "image / is a folder; name the file of an image in it."),
  (lambda m: m.caption("https://a.b/c.png"), "image https://a.b/c.png is an address; save the im"),
  (lambda m: m.caption("nowhere.png"), "image nowhere.png cannot be read"),
  (
    lambda m: m.caption(ARRAY),
    "image has type float32[8, 8]; it must be a path, a PIL image, an",
  ),
  (
    lambda m: m.caption(None),
    "image has type NoneType; it must be a path, a PIL image, an array u",
  ),
  (
    lambda m: m.answer([IMAGE, IMAGE], ["a", "b", "c"]),
    "lists have different lengths: image of 2 and question of 3; "
    "give as many of each, or one for all",
  ),
  (lambda m: m.infill(IMAGE, (0, 0, 9, 2)), "box is 0,0,9,2; it must lie within the image, 8 x 8"),
  (
    lambda m: m.infill(IMAGE, 3),
    "box is 3; it must be (left, top, right, bottom), or a list of bo",
  ),
  (
    lambda m: m.infill(IMAGE, (0, 0, 2, 2), guidance=2.0),
    "guidance is given, and no prompt to gui",
  ),
  (lambda m: m.edit(IMAGE, "blue", guidance=2.0), "task edit reads no setting 'guidance': did you"),
  (lambda m: m.answer(IMAGE, None), "question has type NoneType; it must be a text, or a list"),
  (lambda m: m.edit(IMAGE, 5), "instruction has type int; it must be a text, or a list of texts."),
  (lambda m: m.edit(IMAGE, ""), "task edit needs a prompt, and none is given."),
  (lambda m: m.interleave("a", length=1), "the length is 1; it must be at least 2"),
  (lambda m: m.score("", IMAGE), "the text is empty: give at least one word."),
  (
    lambda m: m.score("car " * 200, IMAGE),
    "the text has 201 tokens and takes 222 positions with i",
  ),
  (lambda m: m.score("a", IMAGE, retrieve=-1), "retrieve is -1; it must be at least 0."),
  (lambda m: m.retrieve("a", k=0), "k is 0; it must be at least 1."),
  (lambda m: m.retrieve(5), "query has type int; it must be a text, a PIL image, an array"),
  (
    lambda m: m.sample([Unconditional()], 2, rank=True),
    "rank is given, and CLIP cannot score task",
  ),
]


@pytest.mark.parametrize(("call", "sentence"), MISTAKES, ids=[s[:40] for _, s in MISTAKES])
def test_a_mistake_is_one_sentence(model, call, sentence):  # noqa: F811
  with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
    call(model)
