"""Tests the nodes for ComfyUI on the server, without ComfyUI."""

import importlib.util
import pathlib

import numpy as np
import pytest

from tests.serving.live import image, pixels

torch = pytest.importorskip("torch")
pytest.importorskip("requests")
pytestmark = pytest.mark.filterwarnings("ignore:(this model|retrieve is) ")


@pytest.fixture
def nodes(live, monkeypatch):
  monkeypatch.setenv("CM3LEON_URL", live.url)
  folder = pathlib.Path(__file__).parents[2] / "examples" / "comfyui"
  spec = importlib.util.spec_from_file_location("node", folder / "comfyui_node.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.NODE_CLASS_MAPPINGS


def call(node, **inputs):
  """Calls a node as ComfyUI does: by the names of INPUT_TYPES, with their defaults."""
  required = node.INPUT_TYPES()["required"]
  defaults = {name: kind[1].get("default", "") for name, kind in required.items() if kind[1:]}
  assert inputs.keys() <= required.keys()
  results = getattr(node(), node.FUNCTION)(**{**defaults, **inputs})
  assert len(results) == len(node.RETURN_TYPES)
  for result, kind in zip(results, node.RETURN_TYPES):
    assert isinstance(result, {"IMAGE": torch.Tensor, "STRING": str}[kind])
  return results[0]


def test_images_are_those_of_the_server(nodes, live):
  found = call(nodes["CM3LeonGenerate"], prompt="a red apple", n=2, seed=5)
  expected = live.generate(prompt="a red apple", n=2, seed=5).json()["data"]
  assert found.dtype == torch.float32
  levels = (found * 255).round().numpy()
  np.testing.assert_array_equal(levels, [pixels(one["b64_json"]) for one in expected])
  assert (call(nodes["CM3LeonGenerate"], prompt="a red apple", n=2, seed=6) != found).any()


def test_edits_captions_and_answers_are_those_of_the_model(nodes, model):
  given = torch.tensor(np.stack([image(2), image(3)])) / 255
  found = call(nodes["CM3LeonEdit"], image=given, prompt="make it blue", seed=1)
  expected = model.edit(image(2), "make it blue", seed=1)
  np.testing.assert_array_equal((found[0] * 255).round().numpy(), expected)
  text = call(nodes["CM3LeonCaption"], image=given, seed=1)
  assert text == model.caption(image(2), seed=1)
  answer = call(nodes["CM3LeonCaption"], image=given, question="What is it?", seed=1)
  assert answer == model.answer(image(2), "What is it?", seed=1)
  assert answer != text


def test_errors_of_the_server_are_shown(nodes):
  with pytest.raises(RuntimeError, match=r"cm3leon serve: n\b"):
    call(nodes["CM3LeonGenerate"], prompt="a", n=99)
