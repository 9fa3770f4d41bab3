"""Tests the perceptual distance against torch, with random weights in the published format."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
import torch

from cm3leon_jax.commands import train_vqgan as command
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.tokenizers import perceptual, vqgan
from cm3leon_jax.training.image_models import trainer, vqgan_training
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.tokenizers.tiny import tiny_config


def tensors_of(calibrated):
  """Returns random weights that preserve the scale of features; LPIPS weights are at least 0."""
  rng, found = np.random.default_rng(0), {}
  for name, shape in perceptual.tensor_shapes(calibrated).items():
    scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.1
    found[name] = (scale * rng.normal(size=shape)).astype(np.float32)
    if name.startswith("lin"):
      found[name] = np.abs(found[name])
  return found


@pytest.fixture(scope="module")
def tensors():
  return tensors_of(calibrated=True)


@pytest.fixture(scope="module")
def pair():
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (2, 2, 32, 32, 3)).astype(np.float32)


def oracle(tensors, x, y):
  """Computes LPIPS in torch like the package lpips, with torchvision's order of VGG16 layers."""
  plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
  layers, inputs = [], 3
  for width in plan:
    if width == "M":
      layers.append(torch.nn.MaxPool2d(2, 2))
    else:
      layers += [torch.nn.Conv2d(inputs, width, 3, padding=1), torch.nn.ReLU()]
      inputs = width
  net = torch.nn.Module()
  net.features = torch.nn.Sequential(*layers)
  own = {k: torch.tensor(v) for k, v in tensors.items() if k.startswith("features")}
  net.load_state_dict(own)
  shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
  scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)

  def features(image):
    h, found = (torch.tensor(image).permute(0, 3, 1, 2) - shift) / scale, []
    for i, layer in enumerate(net.features):
      h = layer(h)
      if i in (3, 8, 15, 22, 29):
        found.append(h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
    return found

  total = 0
  with torch.no_grad():
    for n, (a, b) in enumerate(zip(features(x), features(y))):
      squared = (a - b) ** 2
      name = f"lin{n}.model.1.weight"
      if name in tensors:
        squared = torch.nn.functional.conv2d(squared, torch.tensor(tensors[name]))
      total = total + squared.sum(1).mean((1, 2))
  return total.numpy()


@pytest.mark.parametrize("calibrated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_distance_is_that_of_torch(tensors, pair, calibrated):
  own = {k: v for k, v in tensors.items() if calibrated or not k.startswith("lin")}
  found = jax.jit(perceptual.distance)(perceptual.make_params(own), *pair)
  expected = oracle(own, *pair)
  assert expected.min() > 0.1
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  # Negative control: one wrong bias.
  wrong = {**own, "features.28.bias": own["features.28.bias"] + 0.5}
  assert np.abs(oracle(wrong, *pair) / expected - 1).min() > 1e-3


def test_equal_images_have_no_distance_and_finite_gradients(tensors, pair):
  params = perceptual.make_params(tensors)
  black = jnp.full((1, 16, 16, 3), -1.0)
  # Parameters are arguments, because the program would contain constants.
  distance = jax.jit(jax.value_and_grad(lambda y, p: perceptual.distance(p, black, y).sum()))
  value, gradient = distance(black, params)
  assert 0 <= float(value) < 1e-10
  assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_a_training_counts_the_distance(tensors, tmp_path, monkeypatch):
  """The loss of the first step includes the weighted distance of the reconstructions."""
  monkeypatch.setattr(trainer, "LOG_EVERY", 1)
  config = tiny_config(
    resolution=16, steps=2, batch_size=8, perceptual="vgg.safetensors", perceptual_weight=0.5
  )
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
  plain = dataclasses.replace(config, perceptual="", perceptual_weight=0.0)
  features, first = perceptual.make_params(tensors), {}
  for name, own, given in (("with", config, features), ("without", plain, None)):
    with jax.set_mesh(mesh_of(1, 8, 1)):
      vqgan_training.train(own, 16, 0, images, tmp_path / name, {}, given)
    first[name] = read_json_lines(tmp_path / name / "metrics.jsonl")[0]["loss"]
  params, x = vqgan_training.init_state(plain, 16, 0)["params"], vqgan.to_float(images)
  y = vqgan.bind(plain, 16, params)(x)[0]
  distance = float(jnp.mean(jax.jit(perceptual.distance)(features, x, y)))
  assert distance > 0.1
  assert first["with"] - first["without"] == pytest.approx(0.5 * distance, rel=1e-4)


def test_a_file_of_another_network_is_refused(tensors, tmp_path):
  path = tmp_path / "other.safetensors"
  some = {k: v for k, v in tensors.items() if k != "lin3.model.1.weight"}
  save_file(some, path)
  with refused(UserError, str(path)):
    command._features(str(path))
  save_file({"conv.weight": np.zeros((1,), np.float32)}, path)
  with refused(UserError, str(path)):
    command._features(str(path))
  with refused(UserError, "absent"):
    command._features(str(tmp_path / "absent"))
