"""Writes raw shards: valid records, square images, and rejected records with reasons."""

import collections
from collections.abc import Callable, Iterable
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
from typing import Any

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import summary as raw_statistics
from cm3leon_jax.data.raw.reader import IMAGE_DIGESTS, kind_of
from cm3leon_jax.data.sources.records import (
  KINDS,
  ORIGIN_FIELDS,
  SPLITS,
  RawPair,
  Record,
  Rejected,
  batches,
  crop_key,
  images_of,
  origin_counts,
  with_images,
)
from cm3leon_jax.data.sources.splits import split_of
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.stages import stages

REJECTED = "rejected.jsonl"
FILES = (*(f"{kind}.jsonl" for kind in KINDS), REJECTED)  # Record files of a shard.
BATCH = 256  # Maximum number of records that are read or drawn together.
BATCH_BYTES = 2**27  # A batch ends when its images in memory have this many bytes.
LEAST_CROP = 0.88  # Minimum side of a random crop, relative to the side of the image.
# A function (image, resolution) -> (pixels, (width, height) of the original image).
Load = Callable[[Any, int], tuple[np.ndarray, tuple[int, int]]]


class _Writer:
  """Writes valid records and their images. Counts and lists rejected records."""

  def __init__(
    self, config: RawConfig, folder: epath.Path, load: Load, stack: contextlib.ExitStack
  ):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    self.config, self.folder, self._load = config, folder, load
    self._files = {
      name: stack.enter_context(replacing(folder / name, "w")) for name in (*FILES, IMAGE_DIGESTS)
    }
    self._pool = stack.enter_context(futures.ThreadPoolExecutor(config.num_threads))
    self._keys: dict[type, set[str]] = {cls: set() for cls in KINDS.values()}
    self._concepts: dict[str, set] = {split: set() for split in SPLITS}
    self._counts: collections.Counter[str] = collections.Counter()
    self._reasons: collections.Counter[str] = collections.Counter()
    self._origins: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
    self._digest = hashlib.sha256()
    self._other_licenses, self._num_images, self._first = 0, 0, ""
    self._statistics = raw_statistics.merged([])

  def add(self, items: list) -> None:
    """Writes a batch of records. Reads and writes the images in several threads."""
    suffix, jobs = "jpg" if self.config.jpeg_quality else "png", []
    checked = [self._checked(item) for item in items]
    for item in itertools.chain.from_iterable((one, *self._crops(one)) for one in checked):
      images = images_of(item) if isinstance(item, Record) else []
      numbers = range(self._num_images, self._num_images + len(images))
      jobs.append((item, images, [f"images/{i:07d}.{suffix}" for i in numbers]))
      self._num_images += len(images)
    for item, digest, sizes, files in self._pool.map(lambda job: self._save_images(*job), jobs):
      self._put(item, digest, sizes)
      self._files[IMAGE_DIGESTS].writelines(files)

  def _checked(self, item: Record | Rejected) -> Record | Rejected | None:
    """Fills in defaults. Returns None for an unwanted license, `Rejected` for an invalid record."""
    if isinstance(item, Rejected):
      return item
    defaults: dict[str, Any] = {
      "license": self.config.default_license,
      "attribution": self.config.default_attribution,
    }
    item = dataclasses.replace(item, **{k: getattr(item, k) or v for k, v in defaults.items()})
    if self.config.licenses and item.license not in self.config.licenses:
      self._other_licenses += 1
      return None
    if item.key in self._keys[type(item)]:
      source = item.source or self.config.source
      message = f"key '{item.key}' of {source} occurs twice; keys must be unique."
      return Rejected(item.source, item.key, "duplicate_key", message)
    self._keys[type(item)].add(item.key)
    longest = self.config.max_caption_characters
    if isinstance(item, RawPair) and len(item.caption) > longest:
      message = (
        f"key '{item.key}': the caption has {len(item.caption)} characters, but "
        f"raw.max_caption_characters is {longest}."
      )
      return Rejected(item.source, item.key, "long_caption", message)
    concept = getattr(item, "concept", "") or getattr(item, "group", "") or item.key
    split = item.split or split_of(concept, self.config.heldout_fraction)
    extra: dict[str, Any] = {"concept": concept} if isinstance(item, RawPair) else {}
    return dataclasses.replace(item, split=split, **extra)

  def _crops(self, item: Record | Rejected | None) -> list[RawPair]:
    """Returns one pair for each random crop that is added for a training pair."""
    if not isinstance(item, RawPair) or item.split != "train":
      return []
    numbers = range(1, self.config.crops + 1)
    return [
      dataclasses.replace(item, key=crop_key(item.key, i), added_crop=str(i)) for i in numbers
    ]

  def _load_crop(self, image: str | bytes, key: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Loads a random crop of an image. `key` determines the crop."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    generator, side = np.random.default_rng(seed), self.config.resolution
    # The image is scaled first and then cropped, so that pixels are scaled only once.
    scaled = round(side / generator.uniform(LEAST_CROP, 1))
    array, size = self._load(image, scaled)
    top, left = generator.integers(0, scaled - side + 1, 2)
    return array[top : top + side, left : left + side], size

  def _save_images(
    self, item: Record | Rejected | None, images: list[str | bytes], names: list[str]
  ) -> tuple[Record | Rejected | None, bytes, list[tuple[int, int]], list[str]]:
    """Saves the images of a record.

    Returns the record with the new image names, or `Rejected` after an error. Also returns the
    digest of the pixels, the original sizes, and, for each image file, a line with its SHA-256
    digest.
    """
    if not isinstance(item, Record) or not images:
      return item, b"", [], []
    digest, sizes, files = hashlib.sha256(), [], []
    for image, name in zip(images, names):
      try:
        if getattr(item, "added_crop", ""):
          array, size = self._load_crop(image, item.key)
        else:
          array, size = self._load(image, self.config.resolution)
      except UserError as error:
        if getattr(item, "added_crop", ""):  # The pair of the uncropped image is already rejected.
          return None, b"", [], []
        file = image if isinstance(image, str) else item.source
        rejected = Rejected(file, item.key, "unreadable_image", f"key '{item.key}': {error}")
        return rejected, b"", [], []
      pixels, buffer = Image.fromarray(array), io.BytesIO()
      sizes.append(size)
      digest.update(pixels.tobytes())
      if quality := self.config.jpeg_quality:
        pixels.save(buffer, "jpeg", quality=quality, subsampling=0)
      else:
        pixels.save(buffer, "png")
      files.append(f"{hashlib.sha256(buffer.getvalue()).hexdigest()}  {name}\n")
      (self.folder / name).write_bytes(buffer.getvalue())
    return with_images(item, names), digest.digest(), sizes, files

  def _put(
    self, item: Record | Rejected | None, digest: bytes, sizes: list[tuple[int, int]]
  ) -> None:
    if item is None:
      return
    if isinstance(item, Rejected):  # Written in ASCII, because names may be invalid Unicode.
      self._first = self._first or item.message
      self._reasons[item.reason] += 1
      self._files[REJECTED].write(json.dumps(dataclasses.asdict(item)) + "\n")
      return
    values = dataclasses.asdict(item)
    if not values.get("added_crop"):
      values.pop("added_crop", None)
    line = json.dumps(values, ensure_ascii=False) + "\n"
    kind = kind_of(type(item))
    self._counts[f"{item.split}_{kind}"] += 1
    counted = "crops" if getattr(item, "added_crop", "") else kind
    self._origins[counted, item.source, item.license, item.attribution] += 1
    if isinstance(item, RawPair):
      self._concepts[item.split].add(item.concept or item.key)
    added = raw_statistics.of_record(item, sizes)
    self._statistics = raw_statistics.merged([self._statistics, added])
    self._files[f"{kind}.jsonl"].write(line)
    self._digest.update(line.encode() + digest)

  def summary(self) -> dict:
    """Returns the digest of the records, and counts by split, kind, reason and origin."""
    counts = {
      f"{split}_{kind}": self._counts[f"{split}_{kind}"] for kind in KINDS for split in SPLITS
    }
    counts |= {f"{split}_concepts": len(names) for split, names in self._concepts.items()}
    more = {raw_statistics.REJECTED + reason: n for reason, n in self._reasons.items()}
    if self.config.licenses:
      more = {"other_licenses": self._other_licenses, **more}
    listed = origin_counts(
      {**dict(zip(ORIGIN_FIELDS, origin)), "records": n} for origin, n in self._origins.items()
    )
    summary = {"origins": listed, "counts": counts, "more": more}
    summary["statistics"] = self._statistics
    summary |= {"rejected": dict(self._reasons), "first": self._first}
    return {**summary, "digest": self._digest.hexdigest()}


def write_shard(config: RawConfig, folder: epath.Path, items: Iterable, load: Load) -> dict:
  """Writes the record files and the images of one shard.

  Args:
    load: function of an image and a resolution that returns pixels and the original size, see
      `load_with_size`.

  Returns:
    The summary of the shard: counts and digests.
  """
  with contextlib.ExitStack() as stack:
    writer = _Writer(config, folder, load, stack)
    bar = stack.enter_context(
      progress_bar(desc=f"records {folder.name}", unit="record", leave=False)
    )
    for batch in batches(items, BATCH, BATCH_BYTES):
      writer.add(batch)
      bar.update(len(batch))
  return {
    **writer.summary(),
    "files": stages.describe_files(folder, (*FILES, IMAGE_DIGESTS)),
  }
