"""Finds near-duplicate images in a raw folder, within a split and between splits."""

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
MOST = 4_096  # Maximum number of images that `near_duplicates` compares with each other.
NAMED = 3  # Maximum number of pairs that `near_duplicates` names.


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


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
  """Near duplicates among images of different concepts.

  Attributes:
    near: number of images that are near another image.
    leaked: number of held-out images that are near a training image.
    pairs: record keys of at most NAMED near pairs. Pairs of a held-out and a training image are
      first.
  """

  compared: int
  near: int
  leaked: int
  pairs: list[tuple[str, str]]

  def __str__(self) -> str:
    named = ", ".join(f"'{a}' and '{b}'" for a, b in self.pairs)
    more = ", and more" if 2 * len(self.pairs) < self.near else ""
    of = f"{self.near} of {self.compared:,} compared images"
    said = f"{of} are near duplicates of others: {named}{more}"
    if self.leaked:
      verb = "images have" if self.leaked > 1 else "image has"
      said += (
        f"; {self.leaked} held-out {verb} a near duplicate in training: give both images the same "
        "`concept` (a field of pairs.jsonl; in Python, a pair's third element), or remove one "
        "(cm3leon prepare_data --check_leaks lists them)"
      )
    if 2 * self.near > self.compared:
      said += (
        ". Most images look alike in this comparison, as drawings on a plain background do: if "
        "they show different things, ignore it"
      )
    return said


def near_duplicates(folder: epath.PathLike, num_threads: int) -> NearDuplicates:
  """Compares the first images of a raw folder with each other.

  Compares at most MOST images, which bounds the cost. At most a quarter of MOST are held out.
  """
  images = _first_images(folder, "heldout", MOST // 4)
  heldout = len(images)
  images += _first_images(folder, "train", MOST - heldout)
  prints = duplicates.fingerprints((image for *_, image in images), _load, num_threads)
  number = {concept: i for i, concept in enumerate({concept for _, concept, _ in images})}
  concepts = np.array([number[concept] for _, concept, _ in images], int)
  pairs = np.stack(duplicates.near_pairs(prints)) if images else np.zeros((2, 0), int)
  pairs = pairs[:, (pairs[0] < pairs[1]) & (concepts[pairs[0]] != concepts[pairs[1]])]
  is_leak = (pairs[0] < heldout) & (pairs[1] >= heldout)
  first = pairs[:, np.argsort(~is_leak, kind="stable")[:NAMED]]
  named = [(images[i][0], images[j][0]) for i, j in first.T]
  leaked = len(np.unique(pairs[0, is_leak]))
  return NearDuplicates(len(images), len(np.unique(pairs)), leaked, named)


def _first_images(folder: epath.PathLike, split: str, count: int) -> list[tuple[str, str, str]]:
  """Returns (record key, concept, image path) of the first `count` images of a split."""
  names = reader.shards(folder)
  images = itertools.chain.from_iterable(_images(folder, name, split) for name in names)
  return list(itertools.islice(images, count))


def _images(folder: epath.PathLike, name: str, split: str) -> Iterator[tuple[str, str, str]]:
  """Yields (record key, concept, image path) for every image of a split in a shard."""
  kinds: tuple[type[RawPair | RawInterleaved], ...] = (RawPair, RawInterleaved)
  for cls in kinds:
    for record in reader.read_shard(folder, name, cls, split):
      if getattr(record, "added_crop", ""):  # The original, uncropped image is compared instead.
        continue
      concept = getattr(record, "concept", "") or record.group or record.key
      for image in images_of(record):
        yield record.key, concept, str(image)


def _read(
  folder: epath.PathLike, split: str, num_threads: int
) -> Iterator[tuple[list[str], Fingerprints]]:
  """Yields batches of at most BATCH images of a split: (record keys, fingerprints)."""
  with progress_bar(desc=f"{split} images", unit="image") as bar:
    for name in reader.shards(folder):
      images = ((key, image) for key, _, image in _images(folder, name, split))
      while batch := list(itertools.islice(images, BATCH)):
        keys, paths = zip(*batch)
        yield list(keys), duplicates.fingerprints(paths, _load, num_threads)
        bar.update(len(batch))


def _load(path: str) -> np.ndarray:
  return reader.load_image(path, None)
