"""Tests that a wrong argument of a Python call raises an error with a one-sentence message."""

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax import CM3Leon, UserError
from cm3leon_jax.checkpoints import reading
from cm3leon_jax.generation.image_tasks import Unconditional
from tests.api_test import IMAGE, model, run  # noqa: F401 (fixtures)
from tests.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore:(this model|retrieve is) ")


@pytest.mark.parametrize(
  "options",
  [
    {"batch_size": 0},
    {"weight_dtype": "int4"},
    {"batches": 4},
    {"batch_size": "many"},
    {"show_progress": "yes"},
    {"clip": "elsewhere"},
  ],
)
def test_wrong_options_of_load(run, options, monkeypatch):  # noqa: F811
  monkeypatch.setattr(reading, "load_params", None)  # Reading parameters would fail.
  with refused(UserError):
    CM3Leon.load(run, **options)


@pytest.mark.parametrize("value", [None, 5, b"", b"a", [], " "])
def test_what_is_no_folder_is_neither_loaded_nor_written(model, value):  # noqa: F811
  for call in (CM3Leon.load, model.save):
    with refused(UserError):
      call(value)


@pytest.mark.parametrize(
  "value", [None, "a bell", [5], [None], Unconditional()], ids=lambda v: repr(v)[:13]
)
def test_what_is_no_list_of_tasks_is_one_sentence(model, value):  # noqa: F811
  for call in (model.sample, model.requests):
    with refused(UserError):
      call(value)


ARRAY = np.zeros((8, 8), np.float32)
EMPTY = np.zeros((0, 8, 3), np.uint8)
MISTAKES = [
  lambda m: m.generate(5),
  lambda m: m.generate(" "),
  lambda m: m.generate("a", num_samples=0),
  lambda m: m.generate("a", num_samples=1.5),
  lambda m: m.generate("a", num_samples=True),
  lambda m: m.generate("a", num_samples=2, rank="no"),
  lambda m: m.generate("a", guidance=-1.0),
  lambda m: m.generate("a", seed=-1),
  lambda m: m.generate("a", retrieve=65),
  lambda m: m.generate("a", rank=True),
  lambda m: m.generate("a", temprature=1.0),
  lambda m: m.generate("a", temperature=0.0),
  lambda m: m.generate("a", text_top_k=3),
  lambda m: m.generate("a", guidance=3.0, method="contrastive"),
  lambda m: m.generate("a", contrastive_k=3),
  lambda m: m.generate("car " * 200),
  lambda m: m.caption(IMAGE, length=0),
  lambda m: m.caption(IMAGE, guidance=2.0),
  lambda m: m.caption(EMPTY),
  lambda m: m.caption(Image.new("RGB", (0, 8))),
  lambda m: m.caption("/"),
  lambda m: m.caption("https://a.b/c.png"),
  lambda m: m.caption("nowhere.png"),
  lambda m: m.caption(ARRAY),
  lambda m: m.caption(None),
  lambda m: m.answer([IMAGE, IMAGE], ["a", "b", "c"]),
  lambda m: m.infill(IMAGE, (0, 0, 9, 2)),
  lambda m: m.infill(IMAGE, 3),
  lambda m: m.infill(IMAGE, (0, 0, 2, 2), guidance=2.0),
  lambda m: m.edit(IMAGE, "blue", guidance=2.0),
  lambda m: m.answer(IMAGE, None),
  lambda m: m.edit(IMAGE, 5),
  lambda m: m.edit(IMAGE, ""),
  lambda m: m.interleave("a", length=1),
  lambda m: m.score("", IMAGE),
  lambda m: m.score("car " * 200, IMAGE),
  lambda m: m.score("a", IMAGE, retrieve=-1),
  lambda m: m.retrieve("a", k=0),
  lambda m: m.retrieve(5),
  lambda m: m.sample([Unconditional()], 2, rank=True),
]


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_is_one_sentence(model, call):  # noqa: F811
  with refused(UserError):
    call(model)
