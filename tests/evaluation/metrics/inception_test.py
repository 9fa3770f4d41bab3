"""Tests that the Inception-v3 features for FID equal those of torch-fidelity and pytorch-fid.

Tests cannot download the published weights, so weights and statistics are random, such that
features are not tiny and differ between images.
"""

import jax
import numpy as np
import pytest
import safetensors.numpy

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import inception, published_weights
from cm3leon_jax.evaluation.metrics.inception import Inception
from tests.refusals import refused

torch = pytest.importorskip("torch")
TOLERANCE = 3e-5  # Relative to the largest feature difference between two images; float32.
OTHER = {"tf1": "torch", "torch": "tf1"}
SIZES = [(299, 299), (48, 64), (310, 200)]


def random_tensors():
  rng = np.random.default_rng(0)

  def draw(name, shape):
    if name.endswith("conv.weight"):
      return rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    if name.endswith("bn.weight"):
      return rng.uniform(0.5, 1.5, shape)
    if name.endswith("running_var"):
      return rng.uniform(0.2, 2, shape)
    return rng.normal(0, 0.3, shape)

  shapes = inception.tensor_shapes()
  return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}


def some_images(height, width, n=2):
  """Draws images of rectangles and noise with several contrasts."""
  rng = np.random.default_rng(0)
  rows, columns = np.arange(height) * 7 // height, np.arange(width) * 9 // width
  coarse = rng.integers(0, 256, (n, 7, 9, 3))[:, rows][:, :, columns]
  noise = rng.integers(0, 256, coarse.shape)
  contrast = np.linspace(0.3, 1, n)[:, None, None, None]
  return (contrast * (0.8 * coarse + 0.2 * noise)).astype(np.uint8)


def as_torch(images):
  return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def error(features, expected):
  """Returns the largest error, divided by the largest feature difference between two images."""
  return np.abs(features - expected).max() / np.ptp(expected, axis=0).max()


@pytest.fixture(scope="module")
def tensors():
  return random_tensors()


@pytest.fixture(scope="module")
def state(tensors):
  """Returns the tensors as a state dict of torch, which also has batch counters."""
  state = {name: torch.from_numpy(x) for name, x in tensors.items()}
  variances = [name for name in state if name.endswith("running_var")]
  counters = {name.replace("running_var", inception.COUNTER): torch.tensor(0) for name in variances}
  return state | counters


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # torch is slower with more threads.
  yield
  torch.set_num_threads(threads)


def without_download(module, state, make):
  """Calls `make` with `state` in place of downloaded weights."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: state)
    return make()


@pytest.fixture(scope="module")
def torch_fidelity(state):
  module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
  network = without_download(
    module, state, lambda: module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
  )
  return lambda images: network(as_torch(images))[0].numpy()


@pytest.fixture(scope="module")
def pytorch_fid(state):
  module = pytest.importorskip("pytorch_fid.inception")
  network = without_download(module, state, lambda: module.InceptionV3([3]).eval())
  return lambda images: network(as_torch(images) / 255)[0][:, :, 0, 0].numpy()


@pytest.fixture(scope="module")
def networks(tensors):
  return {
    resize: Inception(tensors, resize, jax.devices()[:1], rows_per_device=2)
    for resize in ("tf1", "torch")
  }


ORACLES = {"tf1": "torch_fidelity", "torch": "pytorch_fid"}


@pytest.mark.parametrize(
  ("resize", "size"),
  [
    pytest.param(resize, size, marks=[] if size == SIZES[0] else [pytest.mark.slow])
    for resize in ORACLES
    for size in SIZES
  ],
  ids=str,
)
def test_features_equal_torch(resize, size, networks, request):
  images = some_images(*size)
  expected = request.getfixturevalue(ORACLES[resize])(images)
  features = networks[resize].embed_images(images)
  assert features.dtype == np.float32
  assert features.shape == expected.shape == (2, inception.WIDTH)
  assert expected.std() > 1
  assert np.ptp(expected, axis=0).max() > 1
  assert error(features, expected) < TOLERANCE
  # Negative control: the other resize method, which also scales pixels differently.
  other = networks[OTHER[resize]]
  assert error(other.embed_images(images), expected) > 100 * TOLERANCE


@pytest.mark.slow
def test_torchvision_pools_otherwise(state, networks):
  """Control: torchvision pools differently, so its features differ even with equal weights."""
  torchvision = pytest.importorskip("torchvision")
  plain = torchvision.models.inception_v3(
    weights=None, init_weights=False, num_classes=inception.CLASSES, aux_logits=False
  )
  plain.load_state_dict(state)
  plain.fc = torch.nn.Identity()
  images = some_images(299, 299)
  with torch.inference_mode():
    expected = plain.eval()((as_torch(images) - 128.0) / 128).numpy()
  assert error(networks["tf1"].embed_images(images), expected) > 100 * TOLERANCE


def resized_by_torch_fidelity(images):
  module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
  resize = module.interpolate_bilinear_2d_like_tensorflow1x
  side = (inception.SIDE, inception.SIDE)
  return (resize(as_torch(images).float(), side, align_corners=False) - 128) / 128


def resized_by_torch(images):
  side = (inception.SIDE, inception.SIDE)
  return 2 * torch.nn.functional.interpolate(as_torch(images) / 255, side, mode="bilinear") - 1


# torch computes pixel positions in float32, which may differ by a rounding error.
RESIZES = {"tf1": (resized_by_torch_fidelity, 0), "torch": (resized_by_torch, 3e-5)}


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (32, 32), (298, 300), (299, 299), (640, 77)])
@pytest.mark.parametrize("resize", RESIZES)
def test_images_are_resized_as_in_torch(resize, size):
  oracle, tolerance = RESIZES[resize]
  images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  expected = oracle(images).permute(0, 2, 3, 1).numpy()
  found, other = (np.asarray(inception.resize_images(images, r)) for r in (resize, OTHER[resize]))
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
  assert np.abs(other - expected).max() > 1e-3  # Negative control.


def test_two_pixels_become_a_ramp():
  """ "tf1" interpolates from the first pixel and repeats the last; "torch" repeats both."""
  images = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(3, axis=3)
  tf1, fid = (np.asarray(inception.resize_images(images, r))[0, 0, :, 0] for r in ("tf1", "torch"))
  assert tf1[[0, 150, 298]].tolist() == pytest.approx([-1, 127 / 128, 127 / 128])
  assert tf1[75] == pytest.approx(255 * (75 * 2 / 299) / 128 - 1, abs=1e-6)
  assert fid[[0, 74, 224, 298]].tolist() == pytest.approx([-1, -1, 1, 1], abs=1e-2)
  assert fid[149] == pytest.approx(0, abs=1e-6)


@pytest.fixture
def loaded(state, tmp_path):
  """Saves the torch weights and loads the file on two devices."""
  path = tmp_path / "fid.safetensors"
  safetensors.numpy.save_file({name: x.numpy() for name, x in state.items()}, path)
  return Inception.load(path, devices=jax.devices()[:2], rows_per_device=1)


def test_a_file_of_torch_is_read(tensors, networks, loaded):
  """The batch counters in the file change nothing."""
  assert loaded.digest == networks["tf1"].digest == published_weights.digest(tensors)
  assert loaded.resize == "tf1"


@pytest.mark.slow
def test_a_batch_is_padded_and_shared_by_devices(networks, loaded):
  images = some_images(24, 24, 3)
  features = networks["tf1"].embed_images(images)
  assert error(loaded.embed_images(images), features) < TOLERANCE
  order = [2, 0, 1]  # Puts another image into the last batch.
  assert error(networks["tf1"].embed_images(images[order]), features[order]) < TOLERANCE
  assert loaded.embed_images(images[:0]).shape == (0, inception.WIDTH)


def test_weights_of_another_network_are_refused(tmp_path):
  path = tmp_path / "other.safetensors"
  first = "Conv2d_1a_3x3.conv.weight"
  safetensors.numpy.save_file({first: np.zeros((32, 3, 3, 2), np.float32)}, path)
  with refused(UserError):
    Inception.load(path)
  with refused(ValueError):
    Inception({}, "bicubic")


def test_imagenet_weights_of_torchvision_are_refused():
  """ImageNet weights have the expected names and shapes, but 1,000 classes."""
  tensors = {
    name: np.broadcast_to(np.float32(0), shape) for name, shape in inception.tensor_shapes().items()
  }
  tensors["fc.weight"] = tensors["fc.weight"][:1000]
  with refused(UserError):
    published_weights.check_shapes("f", tensors, inception.tensor_shapes(), inception.NETWORK)
