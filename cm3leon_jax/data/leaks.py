"""Checks a split: which held-out images of a raw folder are near duplicates of training images."""

from collections.abc import Iterator
import dataclasses
import heapq
import itertools

from etils import epath
import numpy as np

from cm3leon_jax.data import duplicates, raw_pairs
from cm3leon_jax.data.duplicates import Fingerprints
from cm3leon_jax.data.records import RawInterleaved, RawPair, images_of
from cm3leon_jax.progress import progress_bar

BATCH = 1_024  # Images that are read together.
SHOWN = 20  # Pairs that are kept, the nearest.


@dataclasses.dataclass(frozen=True, order=True)
class Pair:
  """A held-out and a training image by the keys of their records; the nearest pair is the smallest.

  Attributes:
    is_far: whether they are not near duplicates (`duplicates.is_near`).
    noise: minus the PSNR of their thumbnails, dB.
    hash_distance: of their perceptual hashes, in [0, 1].
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
class Report:
  """Result of a check.

  Attributes:
    heldout, train: number of images.
    pairs: number of near pairs.
    leaked: number of held-out images with a near training image.
    nearest: at most SHOWN pairs; near pairs first, then the nearest of the others.
  """

  heldout: int
  train: int
  pairs: int
  leaked: int
  nearest: list[Pair]


def check(
  folder: epath.PathLike, num_threads: int, min_psnr: float = duplicates.MIN_PSNR
) -> Report:
  """Compares every held-out image of a raw folder with every training image.

  Reads every image once. Holds the fingerprints of all held-out images, 0.8 kB each, and of 1,024
  training images.

  Args:
    folder: raw folder, see `ingest.prepare`.
    num_threads: number of images read at the same time.
    min_psnr: PSNR in dB from which on thumbnails are near.
  """
  keys, prints = [], []
  for names, batch in _read(folder, "heldout", num_threads):
    keys += names
    prints.append(batch)
  heldout = Fingerprints(
    np.concatenate([p.thumbnails for p in prints] or [np.zeros((0, 768), np.uint8)]),
    np.concatenate([p.hashes for p in prints] or [np.zeros((0, 24), np.uint8)]),
  )
  train, pairs, nearest, leaked = 0, 0, [], np.zeros(len(heldout), bool)
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
  return Report(len(heldout), train, pairs, int(leaked.sum()), nearest)


def _read(
  folder: epath.PathLike, split: str, num_threads: int
) -> Iterator[tuple[list[str], Fingerprints]]:
  """Reads the images of a split, up to BATCH at a time: keys of their records, and fingerprints."""
  with progress_bar(desc=f"{split} images", unit="image") as bar:
    for name in raw_pairs.shards(folder):
      images = (
        (record.key, image)
        for cls in (RawPair, RawInterleaved)
        for record in raw_pairs.read_shard(folder, name, cls, split)
        for image in images_of(record)
      )
      while batch := list(itertools.islice(images, BATCH)):
        keys, paths = zip(*batch)
        yield list(keys), duplicates.fingerprints(paths, _load, num_threads)
        bar.update(len(batch))


def _load(path: str) -> np.ndarray:
  return raw_pairs.load_image(path, None)
