import io

import numpy as np
from PIL import Image, ImageEnhance
import pytest

from cm3leon_jax.data.checks import duplicates
from cm3leon_jax.data.checks.duplicates import MAX_BITS


def photo(seed: int, size: int = 64) -> np.ndarray:
  rng = np.random.default_rng(seed)
  total = np.zeros((size, size, 3))
  for side in (4, 8, 16, 32):
    noise = rng.integers(0, 256, (side, side, 3), np.uint8)
    total += (
      np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)) / side
    )
  total -= total.min()
  return (total / total.max() * 200 + 20).astype(np.uint8)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
  buffer = io.BytesIO()
  image.save(buffer, "jpeg", quality=quality)
  return Image.open(buffer).convert("RGB")


def prints(*images):
  return duplicates.fingerprints(images, np.asarray, 2)


def distances(a, b) -> tuple[float, float]:
  first, second = prints(a), prints(b)
  return duplicates.psnr(first, second).item(), duplicates.hash_distance(first, second).item()


def solid(*color, size=64):
  return np.full((size, size, 3), color, np.uint8)


COPIES = {
  "compressed": lambda image: jpeg(image, 30),
  "half the size": lambda image: image.resize((32, 32)),
  "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
  "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
  "paler": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
}


@pytest.mark.parametrize("name", COPIES)
def test_changed_copies_are_near_and_other_images_are_far(name):
  for seed in range(5):
    image, other = photo(seed), photo(seed + 100)
    copy = COPIES[name](Image.fromarray(image))
    assert duplicates.is_near(*distances(image, copy))
    assert not duplicates.is_near(*distances(other, copy))
    assert distances(other, copy)[1] > 4 * MAX_BITS


def test_psnr_is_that_of_the_definition():
  assert distances(solid(0, 0, 0), solid(51, 51, 51))[0] == pytest.approx(20 * np.log10(5))
  assert distances(solid(9, 9, 9), solid(9, 9, 9))[0] == np.inf


def test_without_texture_only_the_color_counts():
  red, dark_red, blue = solid(255, 0, 0), solid(245, 0, 0), solid(0, 0, 255)
  assert distances(red, blue)[1] == distances(red, red)[1] == 1
  assert duplicates.is_near(*distances(red, dark_red))
  assert not duplicates.is_near(*distances(red, blue))


def test_two_patterns_of_one_brightness_differ_by_color():
  """In gray the two images are equal, so the hash must use each color channel."""
  step = np.linspace(0, 1, 64)[None, :, None] * np.ones((64, 1, 1))
  red = (step * [200, 0, 0]).astype(np.uint8)
  blue = (step * [0, 0, 200]).astype(np.uint8)
  assert distances(red, blue)[1] == 1
