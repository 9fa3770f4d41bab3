"""Tests the nodes for ComfyUI on a server of a tiny model, without ComfyUI."""

import importlib.util

import jax
import numpy as np
import pytest

from cm3leon_jax import CM3Leon
from cm3leon_jax.export import huggingface
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.web.limits import Limits
from tests.serving.live import Live, image, pixels

torch = pytest.importorskip("torch")
pytest.importorskip("requests")
pytestmark = pytest.mark.filterwarnings("ignore:(this model|retrieve is) ")
LIMITS = Limits(most_samples=8, most_bytes=150_000, most_pixels=64 * 64, seconds=120.0)


@pytest.fixture(scope="module")
def model(run):
  return CM3Leon.load(run, mesh=create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


@pytest.fixture(scope="module")
def live(model, run):
  engine = Engine(model.pipeline, model.mesh, slots=3, chunk=4, queue_limit=64)
  engine.start()
  assert engine.wait_until_ready()
  with Live(engine, LIMITS, secret=str(run)) as live:
    yield live
  assert engine.close(seconds=60)


@pytest.fixture
def nodes(live, tmp_path, monkeypatch):
  """Loads the nodes from the copy in an export, and makes each with its default inputs."""
  monkeypatch.setenv("CM3LEON_URL", live.url)
  huggingface.write_scripts(tmp_path)
  spec = importlib.util.spec_from_file_location("node", tmp_path / "comfyui_node.py")
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


def batch(*images):
  return torch.tensor(np.stack([np.asarray(x) for x in images])) / 255


def test_images_are_those_of_the_server(nodes, live):
  found = call(nodes["CM3LeonGenerate"], prompt="a red apple", n=2, seed=5)
  expected = live.generate(prompt="a red apple", n=2, seed=5).json()["data"]
  assert found.dtype == torch.float32
  levels = (found * 255).round().numpy()
  np.testing.assert_array_equal(levels, [pixels(one["b64_json"]) for one in expected])
  assert (call(nodes["CM3LeonGenerate"], prompt="a red apple", n=2, seed=6) != found).any()


def test_edits_captions_and_answers_are_those_of_the_model(nodes, model):
  given = batch(image(2), image(3))
  found = call(nodes["CM3LeonEdit"], image=given, prompt="make it blue", seed=1)
  expected = model.edit(image(2), "make it blue", seed=1)
  np.testing.assert_array_equal((found[0] * 255).round().numpy(), expected)
  text = call(nodes["CM3LeonCaption"], image=given, seed=1)
  assert text == model.caption(image(2), seed=1)
  answer = call(nodes["CM3LeonCaption"], image=given, question="What is it?", seed=1)
  assert answer == model.answer(image(2), "What is it?", seed=1)
  assert answer != text


def test_errors_of_the_server_are_shown(nodes, monkeypatch):
  with pytest.raises(RuntimeError, match=r"cm3leon serve: n\b"):
    call(nodes["CM3LeonGenerate"], prompt="a", n=99)
