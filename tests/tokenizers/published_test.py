"""Published image tokenizers give the codes and pixels of their torch implementations."""

import numpy as np
import pytest

from cm3leon_jax.tokenizers import published, published_files
from cm3leon_jax.tokenizers.published import FAMILIES
from tests.tokenizers import published_oracles

torch = pytest.importorskip("torch")

NUM_CODES = 48
TIE = 1e-5  # Difference of distances, or logits, at which either of two codes is right.
TOLERANCE = 1e-4  # Of pixels.


def some_images(height: int, width: int, count: int = 2) -> np.ndarray:
  return np.random.default_rng(1).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def load(config, num_codes, oracle) -> dict:
  tensors = {name: value.numpy() for name, value in oracle.tensors().items()}
  assert {k: v.shape for k, v in tensors.items()} == published_files.tensor_shapes(
    config, num_codes
  )
  return published_files.from_tensors(tensors, config, num_codes)


def num_different(config, num_codes, params, oracle, images) -> int:
  """Compares codes with the oracle; counts those that are no ties."""
  codes = np.asarray(published.encode(config, num_codes, params, images))
  with torch.no_grad():
    pixels = published_oracles.to_pixels(images, FAMILIES[config.family].lowest_pixel)
    expected, distances = oracle.encode(pixels).numpy(), oracle.distances(pixels).numpy()
  assert codes.shape == expected.shape
  assert codes.dtype == np.int32
  ours, theirs = (np.take_along_axis(distances, x[..., None], -1) for x in (codes, expected))
  assert len(np.unique(expected)) > 5  # Not all images are one code.
  return int(((codes != expected) & (ours - theirs > TIE)[..., 0]).sum())


def largest_difference(config, num_codes, params, oracle, codes) -> float:
  decoded = np.asarray(published.decode_pixels(config, num_codes, params, codes))
  with torch.no_grad():
    expected = oracle.decode(torch.tensor(codes)).numpy()
  assert decoded.shape == expected.shape
  assert decoded.dtype == np.float32
  assert expected.std() > 0.1
  return float(np.abs(decoded - expected).max())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
  config = published_oracles.small(request.param)
  oracle = published_oracles.make(config, NUM_CODES)
  return config, oracle, load(config, NUM_CODES, oracle)


def test_codes_and_pixels_equal_torch(case):
  """The images are not square."""
  config, oracle, params = case
  images = some_images(24, 32)
  assert num_different(config, NUM_CODES, params, oracle, images) == 0
  codes = np.random.default_rng(2).integers(0, NUM_CODES, (2, 6, 8))
  assert largest_difference(config, NUM_CODES, params, oracle, codes) < TOLERANCE
