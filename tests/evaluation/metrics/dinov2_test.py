import json
import shutil
import sys

import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
import transformers

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import published_weights
from cm3leon_jax.evaluation.metrics.dinov2 import DINOv2
from tests.refusals import refused

torch = pytest.importorskip("torch")
TOLERANCE = 1e-5  # Tolerance for features of a size of about 1.
WIDTH, SHORTEST, SIDE = 16, 20, 14
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The file format of the published folders.
PREPROCESSING = {
  "crop_size": {"height": SIDE, "width": SIDE},
  "do_center_crop": True,
  "do_convert_rgb": True,
  "do_normalize": True,
  "do_rescale": True,
  "do_resize": True,
  "image_mean": MEAN,
  "image_processor_type": "BitImageProcessor",
  "image_std": DEVIATION,
  "resample": 3,
  "rescale_factor": 1 / 255,
  "size": {"shortest_edge": SHORTEST},
}


def write_folder(folder):
  """Saves and returns a Dinov2Model with random tensors that are not tiny."""
  config = transformers.Dinov2Config(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
  )
  model = transformers.Dinov2Model(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for value in model.parameters():
      value.normal_(0, 0.5, generator=generator)
  model.save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
  return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("dinov2")
  return folder, write_folder(folder)


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved[0], tmp_path / "copy")


def some_images(n):
  return np.random.default_rng(0).integers(0, 256, (n, 25, 40, 3), np.uint8)


def preprocessed(image):
  """Preprocesses like the model: resizes the shorter side from 25 to 20, then crops 14 x 14."""
  image = Image.fromarray(image).resize((32, SHORTEST), Image.Resampling.BICUBIC)
  pixels = np.asarray(image.crop((9, 3, 9 + SIDE, 3 + SIDE)), np.float32) / 255
  return ((pixels - MEAN) / DEVIATION).transpose(2, 0, 1).astype(np.float32)


def test_features_are_the_normalized_first_token(saved):
  folder, model = saved
  images = some_images(35)
  network = DINOv2.load(folder)
  features = network.embed_images(images)
  with torch.no_grad():
    pixels = torch.from_numpy(np.stack([preprocessed(image) for image in images]))
    outputs = model(pixels, output_hidden_states=True)
  assert features.dtype == np.float32
  expected = model.layernorm(outputs.hidden_states[-1])[:, 0].detach().numpy()
  np.testing.assert_allclose(features, expected, atol=TOLERANCE, rtol=0)
  assert np.ptp(expected, axis=0).max() > 0.1
  # Negative controls: without the final norm; the token of a patch instead of the class token.
  for wrong in (outputs.hidden_states[-1][:, 0], outputs.last_hidden_state[:, 1]):
    assert np.abs(features - wrong.numpy()).max() > 1000 * TOLERANCE
  assert network.embed_images(images[:0]).shape == (0, WIDTH)


def test_the_digest_is_of_the_file(saved):
  tensors = safetensors.numpy.load_file(saved[0] / "model.safetensors")
  assert DINOv2.load(saved[0]).digest == published_weights.digest(tensors)


def change_json(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})


MISTAKES = {
  "no weights": lambda f: (f / "model.safetensors").unlink(),
  "a pickle": lambda f: torch.save({}, f / "model.safetensors"),
  "another network": lambda f: change_json(f / "config.json", model_type="vit"),
  "another processor": lambda f: change_json(
    f / "preprocessor_config.json", image_processor_type="ViTImageProcessor"
  ),
  "no tensor": lambda f: change_tensors(f, lambda t: t.pop("layernorm.bias")),
  "shape": lambda f: change_tensors(
    f, lambda t: t.update({"layernorm.bias": t["layernorm.bias"][1:]})
  ),
  "another tensor": lambda f: change_tensors(
    f, lambda t: t.update({"head.bias": t["layernorm.bias"]})
  ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_load_names_what_does_not_fit(mistake, copy):
  MISTAKES[mistake](copy)
  with refused(UserError):
    DINOv2.load(copy)


def test_without_torch_the_extra_is_named(saved, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with refused(UserError):
    DINOv2.load(saved[0])
