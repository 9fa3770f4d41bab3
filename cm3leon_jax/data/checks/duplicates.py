"""Finds near-duplicate images by fingerprints.

Two images are near if at least one condition holds:
- The PSNR between their 16 x 16 thumbnails is at least MIN_PSNR. This limit allows 1.35 times
  the mean squared error of an image tokenizer for drawings, whose PSNR is 22.7 to 23.3 dB.
  Averaging over blocks of pixels never increases the error, so full images differ at least as much
  as their thumbnails.
- The distance between their perceptual hashes (`hash_distance`) is at most MAX_BITS. A hash
  contains the signs of the lowest frequencies of each color channel. Hashes also find brighter,
  paler and compressed copies.
"""

from collections.abc import Callable, Iterable
from concurrent import futures
import dataclasses

import numpy as np
from PIL import Image
import scipy.fft

# N, M images, H height, W width.

THUMBNAIL = 16  # Side in pixels.
MIN_PSNR = 22.0  # In dB. Thumbnails with at least this PSNR are near.
MAX_BITS = 0.1  # Images with at most this `hash_distance` are near.

_FREQUENCIES = 8  # Number of frequencies per axis. The hash omits frequency 0, the mean color.
_NOISE = 1.0  # Larger coefficients set their bit. The signs of small ones depend on rounding.


@dataclasses.dataclass(frozen=True)
class Fingerprints:
  """Fingerprints of N images, with 0.8 kB per image.

  Thumbnails are [N, 768] uint8. Hashes are [N, 24] uint8, with 8 bits of the hash per byte.
  """

  thumbnails: np.ndarray
  hashes: np.ndarray

  def __len__(self) -> int:
    return len(self.thumbnails)

  def __getitem__(self, rows: slice) -> "Fingerprints":
    return Fingerprints(self.thumbnails[rows], self.hashes[rows])


def fingerprint(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Computes one row of `Fingerprints`: thumbnail and hash of an image, [H, W, 3] uint8."""
  small = Image.fromarray(image).resize((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.BOX)
  waves = scipy.fft.dctn(np.asarray(small, np.float64), axes=(0, 1), norm="ortho")
  low = waves[:_FREQUENCIES, :_FREQUENCIES].reshape(-1, 3)[1:]
  return np.asarray(small.reduce(2)).reshape(-1), np.packbits(low > _NOISE)


def fingerprints(
  images: Iterable, load: Callable[..., np.ndarray], num_threads: int
) -> Fingerprints:
  """Computes the fingerprints of images, which `load` reads. Does not keep the images."""
  with futures.ThreadPoolExecutor(num_threads) as pool:
    rows = list(pool.map(lambda image: fingerprint(load(image)), images))
  if not rows:
    return Fingerprints(np.zeros((0, 3 * THUMBNAIL**2), np.uint8), np.zeros((0, 24), np.uint8))
  return Fingerprints(*map(np.stack, zip(*rows)))


def psnr(a: Fingerprints, b: Fingerprints) -> np.ndarray:
  """Computes the PSNR between thumbnails of two sets, [N, M] dB; infinity for equal thumbnails.

  All sums are integers that float64 represents exactly, so every machine finds the same near pairs.
  """
  x, y = a.thumbnails.astype(np.float64), b.thumbnails.astype(np.float64)
  squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
  with np.errstate(divide="ignore"):
    return 10 * np.log10(255**2 * x.shape[1] / squares)


def hash_distance(a: Fingerprints, b: Fingerprints) -> np.ndarray:
  """Computes the distances between hashes of two sets, [N, M].

  The distance is the number of differing bits, divided by the number of bits that are set in at
  least one of the two hashes. If no bit is set, as for images without texture, the distance is 1.
  """
  x, y = (np.unpackbits(f.hashes, axis=1).astype(np.float32) for f in (a, b))
  both = x @ y.T
  either = x.sum(1)[:, None] + y.sum(1)[None] - both
  return np.where(either > 0, 1 - both / np.maximum(either, 1), 1.0)


def is_near(noise: np.ndarray, distance: np.ndarray, min_psnr: float = MIN_PSNR) -> np.ndarray:
  """Returns, for each pair of images, whether it is near, [N, M] bool."""
  return (noise >= min_psnr) | (distance <= MAX_BITS)
