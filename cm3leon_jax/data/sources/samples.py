"""Reads samples. A sample is an image with the caption files of the same name.

The same rules apply to members of a WebDataset tar and to files in a folder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
import itertools
import json
import os
import posixpath
import unicodedata
import zlib

import fsspec

from cm3leon_jax.data.sources.records import (
  RawPair,
  Record,
  RecordError,
  Rejected,
  checked_record,
  renamed,
)

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "avif", "jfif", "bmp", "tif", "tiff")
# Images in these formats are rejected later. Their caption files must not be read as texts.
OTHER_IMAGES = ("heic", "heif", "jxl", "svg")
# The caption comes from the first of these files that is not blank.
CAPTION_SUFFIXES = ("txt", "caption", "json")
SAMPLE_SUFFIXES = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES)  # Other members of a tar are not read.
GROUP = 1_000  # Mean number of samples per part. A part has at most 4 times as many.
THREADS = 8  # Number of samples whose files are read in parallel.

_IMAGES = (*IMAGE_SUFFIXES, *OTHER_IMAGES)


def by_stem(names: Iterable[str]) -> dict[str, list[str]]:
  """Groups the names of images and caption files by stem, the path without the suffix.

  names  = ["a/x.JPG", "a/x.txt", "a/y.txt", "a/z.png", "a/z.png.txt", "notes.md"]
  result = {"a/x": ["a/x.JPG", "a/x.txt"], "a/y": ["a/y.txt"], "a/z": ["a/z.png", "a/z.png.txt"]}

  Names in different Unicode forms are equal. The stem is that of the first name.
  """
  stems: dict[str, list[str]] = {}
  for name in names:
    if suffix_of(name) in (*_IMAGES, *CAPTION_SUFFIXES):
      stems.setdefault(unicodedata.normalize("NFC", _stem_of(name)), []).append(name)
  return {_stem_of(grouped_names[0]): grouped_names for grouped_names in stems.values()}


def _stem_of(name: str) -> str:
  """Returns a path without its suffixes: _stem_of("a/x.jpg") = _stem_of("a/x.jpg.txt") = "a/x"."""
  stem = name.rpartition(".")[0]
  of_image = suffix_of(name) in CAPTION_SUFFIXES and suffix_of(stem) in _IMAGES
  return stem.rpartition(".")[0] if of_image else stem


def suffix_of(name: str) -> str:
  """Returns the suffix of a file in lower case, or "": suffix_of("a/x.JPG") = "jpg"."""
  before, _, suffix = name.rpartition(".")
  return suffix.lower() if before and "/" not in suffix else ""


def has_image(names: Iterable[str]) -> bool:
  """Returns whether at least one file is an image."""
  return any(suffix_of(name) in _IMAGES for name in names)


def has_caption(names: Iterable[str]) -> bool:
  """Returns whether at least one file has the suffix of a caption file."""
  return any(suffix_of(name) in CAPTION_SUFFIXES for name in names)


def grouped(stems: Iterable[str]) -> Iterator[list[str]]:
  """Yields groups of 1,000 stems on average.

  The hash of a stem decides whether a group begins at this stem. Therefore, adding or removing a
  stem changes only one group, rarely two.
  """
  group: list[str] = []
  for stem in stems:
    first = zlib.crc32(stem.encode(errors="surrogateescape")) % GROUP == 0
    if group and (first or len(group) == 4 * GROUP):
      yield group
      group = []
    group.append(stem)
  if group:
    yield group


def folder_samples(
  fs: fsspec.AbstractFileSystem, root: str, files: Iterable[str], images: Callable
) -> Iterator[Record | Rejected]:
  """Yields the samples of a folder in the order of `files`. Keys are stems relative to `root`.

  `images` checks image paths and makes them absolute, see `formats._with_images`.
  """
  files = list(files)
  stems, known = iter(by_stem(files).items()), set(files)
  with futures.ThreadPoolExecutor(THREADS) as pool:
    while batch := list(itertools.islice(stems, 2 * THREADS)):
      for item in pool.map(lambda sample: _folder_sample(fs, root, *sample), batch):
        image = item.image if isinstance(item, RawPair) else ""
        where = posixpath.join(root, image) if isinstance(image, str) and image else root
        yield images(item, root, where, known)


def _folder_sample(
  fs: fsspec.AbstractFileSystem, root: str, stem: str, names: list[str]
) -> Record | Rejected:
  """Reads the caption files of one sample. Image paths in the result are relative to `root`."""
  where = next((name for name in names if suffix_of(name) in _IMAGES), names[0])
  key = posixpath.relpath(stem, root)
  sample: dict[str, bytes | str] = {}
  for name in names:
    suffix = name.rpartition(".")[2]
    if suffix.lower() in _IMAGES:
      sample[suffix] = posixpath.relpath(name, root)
    elif "file" in fs.protocol and os.path.islink(name):
      message = f"{name} is a link, which is not read: replace it by the file itself."
      return Rejected(where, key, "linked_file", message)
    else:
      sample[suffix] = fs.cat_file(name)
  return sample_record(where, where, key, sample, source=root)


def sample_record(
  file: str, where: str, key: str, sample: Mapping[str, bytes | str], source: str
) -> Record | Rejected:
  """Returns the pair of a sample, with its first image and its first caption that is not blank.

  Args:
    sample: suffix -> content of a file, or path of an image.
    source: value of the field `source` if the .json file does not define it.
  """
  try:
    about, captions = _captions(where, sample)
  except RecordError as error:
    return Rejected(file, key, error.reason, str(error))
  values = {k: v if k in ("caption", "facts") else str(v) for k, v in about.items()}
  values = {"source": source, **values, "key": key}
  values.pop("image", None)
  if captions:
    result = (text for text in captions if not isinstance(text, str) or text.strip())
    text = next(result, "")
    values["caption"] = text.strip() if isinstance(text, str) else text
  found_images = (s for s in sample if s.lower() in _IMAGES)
  images = sorted(found_images, key=lambda s: (_IMAGES.index(s.lower()), s))
  stem = posixpath.basename(key)
  if not images and "caption" in values:
    message = f"{where} has no image; it must have one of .{', .'.join(IMAGE_SUFFIXES)}."
    return Rejected(file, key, "missing_image", message)
  if not images:
    message = f"{where} has no image and no caption, only {', '.join(sample)}."
    return Rejected(file, key, "malformed_record", message)
  if not captions:
    message = f"{where} has no caption; give it one in {stem}.txt, {stem}.caption or {stem}.json."
    return Rejected(file, key, "missing_caption", message)
  return checked_record(RawPair, {**values, "image": sample[images[0]]}, file, where)


def _captions(where: str, sample: Mapping[str, bytes | str]) -> tuple[dict, list]:
  """Returns the fields of the .json file, and the captions, the preferred one first."""
  about, captions = {}, []
  for preferred in CAPTION_SUFFIXES:
    for suffix in [s for s in sample if s.lower() == preferred]:
      try:
        content = sample[suffix]
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        fields = json.loads(text) if preferred == "json" else None
      except UnicodeDecodeError as error:
        message = f"{where}: its .{suffix} is not UTF-8 ({error}); save it as UTF-8."
        raise RecordError(message) from error
      except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: its .{suffix} is not valid JSON ({error}).") from error
      if preferred != "json":
        captions.append(text)
        continue
      about = renamed(fields) if isinstance(fields, dict) else {}
      about = {name: value for name, value in about.items() if value is not None}
      if "caption" in about:
        captions.append(about["caption"])
  return about, captions
