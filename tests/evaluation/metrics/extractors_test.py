"""Tests the features of Inception-v3 and CLIP, and what identifies them.

Tests cannot download the published weights, so weights and statistics are random, such that
features are not tiny and differ between images.
"""

import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP, init_params
from cm3leon_jax.config.tokenizers import CLIPConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics import distances, published_weights
from cm3leon_jax.evaluation.metrics.extractors import load_clip, load_inception
from tests.clip import huggingface_test
from tests.models.tiny import random_arrays
from tests.refusals import refused

torch = pytest.importorskip("torch")
pytorch_fid = pytest.importorskip("pytorch_fid.inception")
torch_fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
TOLERANCE = 3e-5  # Relative to the largest feature difference between two images; float32.
TINY = CLIPConfig(
  resolution=16, patch=8, image_width=64, image_layers=1, text_width=64, text_layers=1,
  text_length=6, embed_dim=8,
)  # fmt: skip


def some_images(n, height=16, width=16):
  return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


@pytest.fixture(autouse=True)
def _one_thread():
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # torch is slower with more threads.
  yield
  torch.set_num_threads(threads)


def random_state():
  """Returns a random state dict of the Inception-v3 of the FID."""
  generator = torch.Generator().manual_seed(0)

  def draw(name, like):
    if name.endswith("conv.weight"):
      return torch.randn(like.shape, generator=generator) * (2 / like[0].numel()) ** 0.5
    if name.endswith(("bn.weight", "running_var")):
      return 0.5 + torch.rand(like.shape, generator=generator)
    return 0.3 * torch.randn(like.shape, generator=generator)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
    patch.setattr(torch_fidelity, "load_state_dict_from_url", lambda *args, **kwargs: None)
    network = torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
  return {
    name: draw(name, like)
    for name, like in network.state_dict().items()
    if "num_batches" not in name
  }


def oracle(module, state, make):
  """Calls `make` with `state` in place of downloaded weights."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: state)
    return make().eval()


def test_features_of_inception_equal_both_scripts_of_the_fid(tmp_path):
  state, path, images = random_state(), tmp_path / "fid.safetensors", some_images(2, 48, 64)
  tensors = {name: x.numpy() for name, x in state.items()}
  safetensors.numpy.save_file(tensors, path)
  first = oracle(
    torch_fidelity,
    state,
    lambda: torch_fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]),
  )
  second = oracle(pytorch_fid, state, lambda: pytorch_fid.InceptionV3([3]))
  pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
  with torch.inference_mode():
    expected = {
      "tf1": first(pixels)[0].numpy(), "torch": second(pixels / 255)[0][:, :, 0, 0].numpy()
    }  # fmt: skip
  for resize, other in (("tf1", "torch"), ("torch", "tf1")):
    extractor = load_inception(path, resize)
    found = extractor.embed(images)
    spread = np.ptp(expected[resize], axis=0).max()
    assert (found.dtype, found.shape) == (np.float32, (2, 2048))
    assert spread > 0.5
    assert np.abs(found - expected[resize]).max() / spread < TOLERANCE
    # Negative control: the other resize method, which also scales pixels differently.
    assert np.abs(found - expected[other]).max() / spread > 100 * TOLERANCE
    assert extractor.name == f"inception-v3 ({resize} resize)"
    assert extractor.identity == {
      "network": "Inception-v3 of the FID",
      "tensors": published_weights.digest(tensors),
      "resize": resize,
    }
  safetensors.numpy.save_file({**tensors, "fc.weight": tensors["fc.weight"][:1000]}, path)
  with pytest.raises(RuntimeError, match=r"fc\.weight"):  # Weights of torchvision.
    load_inception(path)


def check(extractor, images, expected):
  features = extractor.embed(images)
  assert features.dtype == np.float32
  np.testing.assert_array_equal(features, expected)
  assert json.loads(json.dumps(extractor.identity)) == extractor.identity


def test_the_clip_of_the_run(tmp_path):
  types = jax.eval_shape(lambda: init_params(TINY, 32, jax.random.key(0)))
  clip = CLIP(TINY, 32, random_arrays(types))
  clip.save(tmp_path / "clip")
  extractor, images = load_clip("", tmp_path), some_images(3)
  check(extractor, images, clip.embed_images(images))
  assert extractor.identity["image"] == {"encoder": "vit", "resolution": 16}
  with refused(UserError, "16, 20"):
    extractor.embed(some_images(1, 16, 20))
  # With other parameters in the same folder, the identity changes.
  CLIP(TINY, 32, random_arrays(types, seed=1)).save(tmp_path / "clip")
  assert load_clip("", tmp_path).identity["tensors"] != extractor.identity["tensors"]


def test_a_published_clip(tmp_path):
  """A published CLIP computes in float32, and its identity depends on its image processor."""
  huggingface_test.write_checkpoint(tmp_path, "quick_gelu", huggingface_test.END)
  extractor, images = load_clip(str(tmp_path), "no workdir"), some_images(2, 20, 28)
  check(extractor, images, HFCLIP.load(tmp_path, "float32").embed_images(images))
  assert extractor.identity["image"]["activation"] == "quick_gelu"
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 2}))
  changed = load_clip(str(tmp_path), "no workdir").identity
  assert changed != extractor.identity
  assert changed["tensors"] == extractor.identity["tensors"]


def test_without_torch_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(distances.extras, "install", lambda extra: f"install {extra}")
  monkeypatch.setitem(sys.modules, "torch_fidelity", None)
  with refused(UserError, "install eval"):
    load_inception("absent")
