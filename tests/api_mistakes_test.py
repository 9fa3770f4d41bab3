"""Breaks calls of the API: a wrong argument is refused, instead of being ignored or half used."""

import jax
import numpy as np
import pytest

from cm3leon_jax import CM3Leon, UserError
from cm3leon_jax.generation.image_tasks import Unconditional
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.weights import reading
from tests.api_test import IMAGE
from tests.refusals import refused


@pytest.mark.parametrize(
  "options",
  [
    {"batch_size": 0},
    {"weight_dtype": "int4"},
    {"batches": 4},
    {"dtype": "float8"},
    {"dtype": "float16"},
    {"devices": "cpu"},
    {"devices": [0]},
    {"device": "cpu"},
    {"devices": jax.devices()[:1], "mesh": create_mesh(MeshConfig(), jax.devices()[:1])},
    {"devices": 3},
    {"clip": "elsewhere"},
  ],
)
def test_wrong_options_of_load(run, options, monkeypatch):
  monkeypatch.setattr(reading, "load_params", None)  # Reading parameters would fail.
  name = max(options)
  facts = {"devices": "int|str|device", "dtype": f"dtype is '{options.get('dtype')}'; it must"}
  with pytest.raises((ValueError, TypeError, AttributeError), match=facts.get(name, name)):
    CM3Leon.load(run, **options)


# A call, and what its error names. Other arguments of these types would be right.
MISTAKES = [
  (lambda m: m.generate(" "), "prompt"),
  (lambda m: m.generate("a", guidance=-1.0), "guidance is -1.0"),
  (lambda m: m.generate("a", num_samples=-1), "num_samples is -1"),
  (lambda m: m.generate("a", rank=True), "num_samples is 1"),
  (lambda m: m.generate("a", seed=-1), "seed is -1"),
  (lambda m: m.generate("a", retrieve=65), "65"),
  (lambda m: m.generate("a", temprature=1.0), "'temprature'"),
  (lambda m: m.generate("a", temperature=0.0), "temperature is 0.0"),
  (lambda m: m.generate("a", text_top_k=3), "'text_top_k'"),
  (lambda m: m.generate("a", guidance=3.0, method="contrastive"), "guidance is given"),
  (lambda m: m.generate("a", contrastive_k=3), "contrastive_k is given"),
  (lambda m: m.generate("car " * 200), "prompt has"),
  (lambda m: m.caption(IMAGE, guidance=2.0), "'guidance'"),
  (lambda m: m.caption("nowhere.png"), "nowhere.png"),
  (lambda m: m.caption("/"), "folder"),
  (lambda m: m.answer([IMAGE, IMAGE], ["a", "b", "c"]), "image of 2 and prompt of 3"),
  (lambda m: m.infill(IMAGE, (0, 0, 9, 2)), "box is 0,0,9,2"),
  (lambda m: m.infill(IMAGE, (0, 0, 2)), "box is 0,0,2"),
  (lambda m: m.infill(IMAGE, (0, 0, 2, 2), guidance=2.0), "guidance is given"),
  (lambda m: m.edit(IMAGE, ""), "prompt"),
  (lambda m: m.interleave("a", length=1), "length"),
  (lambda m: m.score("", IMAGE), "text is empty"),
  (lambda m: m.score("a", IMAGE, retrieve=-1), "-1"),
  (lambda m: m.retrieve("a", k=0), "0 documents"),
  (lambda m: m.sample([Unconditional()], 2, rank=True), "rank"),
  (lambda m: m.generate(None), "prompt is None"),
  (lambda m: m.generate("a", num_samples="4"), "num_samples is '4'"),
  (lambda m: m.generate("a", seed="a"), "seed is 'a'"),
  (lambda m: m.generate("a", retrieve=1.5), "retrieve is 1.5"),
  (lambda m: m.caption(np.zeros((8, 8, 3), np.float32)), "image is an array of float32"),
  (lambda m: m.caption(None), "image is None"),
  (lambda m: m.score(None, IMAGE), "text is None"),
  (lambda m: m.retrieve(5), "image is 5"),
]


@pytest.mark.parametrize(("call", "fact"), MISTAKES)
def test_a_mistake_is_one_sentence(model, call, fact):
  with refused(UserError, fact):
    call(model)


def test_inputs_that_are_no_list_are_an_error_of_python(model):
  with pytest.raises(TypeError):
    model.infill(IMAGE, 3)
