"""Finds held-out images of a raw folder that are near duplicates of training images."""

from collections.abc import Iterator
import dataclasses
import heapq
import itertools

from etils import epath
import numpy as np

from cm3leon_jax.data.checks import duplicates
from cm3leon_jax.data.checks.duplicates import Fingerprints
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import RawInterleaved, RawPair, images_of
from cm3leon_jax.files.progress import progress_bar

BATCH = 1_024  # Number of images that are read together.
SHOWN = 20  # Maximum number of pairs that a report keeps.


@dataclasses.dataclass(frozen=True, order=True)
class Pair:
  """A held-out image and a training image. Sorting a list of pairs puts the nearest pairs first.

  Attributes:
    is_far: False for near duplicates (`duplicates.is_near`).
    noise: negated PSNR between the thumbnails, in dB.
    hash_distance: distance between the perceptual hashes, in [0, 1].
    heldout, train: keys of the records.
  """

  is_far: bool
  noise: float
  hash_distance: float
  heldout: str
  train: str

  def __str__(self) -> str:
    kind = "not near" if self.is_far else "near"
    numbers = f"PSNR {-self.noise:.1f} dB, hash distance {self.hash_distance:.2f}"
    return f"{kind}: heldout '{self.heldout}', train '{self.train}', {numbers}"


@dataclasses.dataclass(frozen=True)
class LeakReport:
  """Result of the search for held-out images that are also training images.

  Attributes:
    heldout, train: numbers of compared images.
    pairs: number of near pairs.
    leaked: number of held-out images with a near training image.
    nearest: at most SHOWN pairs. Near duplicates are first, then the most similar other pairs.
  """

  heldout: int
  train: int
  pairs: int
  leaked: int
  nearest: list[Pair]


def check(
  folder: epath.PathLike, num_threads: int, min_psnr: float = duplicates.MIN_PSNR
) -> LeakReport:
  """Compares every held-out image of a raw folder with every training image.

  Reads every image once. Keeps the fingerprints of all held-out images (0.8 kB per image) and of
  1,024 training images in memory. Thumbnails are near if their PSNR is at least `min_psnr` dB.
  """
  keys, prints = [], []
  for names, batch in _read(folder, "heldout", num_threads):
    keys += names
    prints.append(batch)
  heldout = Fingerprints(
    np.concatenate([p.thumbnails for p in prints] or [np.zeros((0, 768), np.uint8)]),
    np.concatenate([p.hashes for p in prints] or [np.zeros((0, 24), np.uint8)]),
  )
  nearest: list[Pair] = []
  train, pairs, leaked = 0, 0, np.zeros(len(heldout), bool)
  for names, batch in _read(folder, "train", num_threads):
    train += len(names)
    for start in range(0, len(heldout), BATCH):
      rows = heldout[start : start + BATCH]
      psnr, distance = duplicates.psnr(rows, batch), duplicates.hash_distance(rows, batch)
      near = duplicates.is_near(psnr, distance, min_psnr)
      pairs += int(near.sum())
      leaked[start : start + BATCH] |= near.any(1)
      shown = near.copy()
      shown.flat[psnr.argmax()] = True
      block = (
        Pair(not near[i, j], -psnr[i, j], distance[i, j], keys[start + i], names[j])
        for i, j in np.argwhere(shown)
      )
      nearest = heapq.nsmallest(SHOWN, itertools.chain(nearest, block))
  return LeakReport(len(heldout), train, pairs, int(leaked.sum()), nearest)


def _images(folder: epath.PathLike, name: str, split: str) -> Iterator[tuple[str, str]]:
  """Yields (record key, image path) for every image of a split in a shard."""
  kinds: tuple[type[RawPair | RawInterleaved], ...] = (RawPair, RawInterleaved)
  for cls in kinds:
    for record in reader.read_shard(folder, name, cls, split):
      if getattr(record, "added_crop", ""):  # The original, uncropped image is compared instead.
        continue
      for image in images_of(record):
        yield record.key, str(image)


def _read(
  folder: epath.PathLike, split: str, num_threads: int
) -> Iterator[tuple[list[str], Fingerprints]]:
  """Yields batches of at most BATCH images of a split: (record keys, fingerprints)."""
  with progress_bar(desc=f"{split} images", unit="image") as bar:
    for name in reader.shards(folder):
      images = _images(folder, name, split)
      while batch := list(itertools.islice(images, BATCH)):
        keys, paths = zip(*batch)
        yield list(keys), duplicates.fingerprints(paths, _load, num_threads)
        bar.update(len(batch))


def _load(path: str) -> np.ndarray:
  return reader.load_image(path, None)
