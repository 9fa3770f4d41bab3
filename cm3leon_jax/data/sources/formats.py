"""Reads raw records from image folders, WebDataset tars, Parquet, JSONL and plain text.

A source is split into parts, and each part becomes a raw shard. Paths are local or in a GCS bucket
(`gs://`). A path may be a glob pattern, which names several files.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
import dataclasses
import functools
import hashlib
import posixpath
from typing import Any

import fsspec

from cm3leon_jax.data.sources.archives import parquet_rows, tar_samples
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.data.sources.lines import csv_rows, decode, json_lines
from cm3leon_jax.data.sources.records import (
  RawInterleaved,
  RawPair,
  RawText,
  Record,
  RecordError,
  Rejected,
  checked_record,
  images_of,
  key_of,
  renamed,
  required_fields,
  with_images,
)
from cm3leon_jax.data.sources.samples import (
  by_stem,
  folder_samples,
  grouped,
  has_caption,
  has_image,
  suffix_of,
)
from cm3leon_jax.data.sources.source_files import is_in, list_files, open_source, root_of
from cm3leon_jax.errors import UserError, printable

PAIR_FILES = ("pairs.jsonl", "captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
TEXTS = "texts.jsonl"
INTERLEAVED = "interleaved.jsonl"
SUFFIXES = {"webdataset": (".tar",), "parquet": (".parquet",), "text": (".jsonl", ".txt")}
LISTS = (*PAIR_FILES, TEXTS, INTERLEAVED)
IMAGE_LISTS = (*PAIR_FILES, INTERLEAVED)
# JSONL files without texts. A source may be a raw shard, which has the file rejected.jsonl.
NO_TEXTS = (*LISTS, "rejected.jsonl")
TEXT_FILES = 1_000  # Maximum number of .txt files per part.
MOST_LISTED = 10  # Number of texts beside images that `parts` prints.

REMEDY = "config.raw.allow_outside=True allows images from everywhere."


@dataclasses.dataclass(frozen=True)
class SourcePart:
  """A part of a source, which becomes a raw shard.

  Attributes:
    kind: a `Format` other than `auto`.
    files: usually one file. `text` may have many .txt files. `folder` has the path of the folder.
      `sidecars` has the folder of the source, and then the images and caption files of the part.
    bytes: total size of the files.
    modified: digest of the modification times of local files, or of checksums in a GCS bucket.
      Files are unchanged if size and digest are unchanged. Empty for the sources of a function.
  """

  kind: str
  files: tuple[str, ...]
  bytes: int
  modified: str = dataclasses.field(default="", repr=False)

  def identity(self) -> dict:
    """Returns the fields on which the shard depends."""
    fields = dataclasses.asdict(self)
    return fields if self.modified else {k: v for k, v in fields.items() if k != "modified"}


def digest_of(parts: list[SourcePart]) -> str:
  """Returns a SHA-256 digest of the parts, which changes if one of their files changes."""
  stamps = "".join(part.modified for part in parts)
  return hashlib.sha256(f"{parts!r}{stamps}".encode()).hexdigest()


def parts(source: str, kind: str = "auto", workdir: str = "") -> list[SourcePart]:
  """Splits `source` into parts in a fixed order.

  A part is a tar, Parquet or JSONL file, a folder with a list of captions, up to 1,000 .txt files,
  or about 1,000 images with their caption files.

  Args:
    source: a folder, a file or a glob pattern, local or `gs://`.
    kind: a `Format`. `auto` detects the formats from the file names.
    workdir: folder of the run. Folders in the source that runs wrote are left out.

  Raises:
    UserError: the source has no files, or no file of a known format.
  """
  fs, path = open_source(source)
  found = list_files(fs, path, source, workdir)
  # Links are allowed only in `sidecars`, whose reader checks where they lead.
  files = [name for name, about in found.items() if not about.is_link]
  kinds = [kind] if kind != "auto" else _detect(found, files, source)
  result = []
  for each in kinds:
    if each == "folder":
      named = sorted(_folders(files, LISTS))
      groups = [([f for f in files if is_in(f, {name})], [name]) for name in named]
    elif each == "sidecars":
      root = root_of(path, found)
      folders = _folders(files, IMAGE_LISTS) if kind == "auto" else set()
      groups = [(names, [root, *names]) for names in _samples(found, root, folders)]
    else:
      beside = found if len(kinds) > 1 else ()
      groups = [(names, names) for names in _single(each, files, beside)]
      texts = [name for names, _ in groups for name in names if suffix_of(name) == "txt"]
      if texts and "sidecars" in kinds:
        _print_texts(texts)
    for names, paths in groups:
      stamps = "\n".join(found[name].stamp for name in names)
      modified = hashlib.sha256(stamps.encode()).hexdigest()[:16]
      urls = tuple(_url(fs, p) for p in paths)
      result.append(SourcePart(each, urls, sum(found[name].size for name in names), modified))
  if not result:
    what = {
      "auto": "whose files are links, which are not read: replace them by the files themselves",
      "folder": f"a folder without {', '.join(LISTS)}",
      "sidecars": "which has no image; format is 'sidecars'",
    }
    suffixes = " or ".join(SUFFIXES.get(kind, ()))
    refusal = what.get(kind, f"which has no {suffixes} file; format is '{kind}'")
    raise UserError(f"config.raw.source is '{source}', {refusal}.")
  return result


def _samples(files: Iterable[str], root: str, folders: Collection[str]) -> Iterator[list[str]]:
  """Groups images with their caption files. Skips `folders`, which have lists of captions.

  Without `folders`, the groups include images without a caption, which are rejected later. Groups
  depend only on the paths relative to `root`.
  """
  stems = by_stem(f for f in files if not is_in(f, folders))
  taken = {
    stem[len(root) :]: names
    for stem, names in stems.items()
    if (has_image(names) and (not folders or has_caption(names)))
    or any(suffix_of(name) == "caption" for name in names)
  }
  for group in grouped(taken):
    yield [name for stem in group for name in taken[stem]]


def _single(kind: str, files: Iterable[str], beside: Collection[str]) -> list[list[str]]:
  """Groups files of one format. With `beside` (all files), skips caption files and lists."""
  names = [name for name in files if name.lower().endswith(SUFFIXES[kind])]
  if beside:
    of_images = {n for group in by_stem(beside).values() if has_image(group) for n in group}
    folders = _folders(beside, LISTS)
    names = [
      name
      for name in names
      if posixpath.basename(name) not in NO_TEXTS
      and name not in of_images
      and (suffix_of(name) == "txt" or not is_in(name, folders))
    ]
  texts = [name for name in names if suffix_of(name) == "txt"]
  groups = [texts[i : i + TEXT_FILES] for i in range(0, len(texts), TEXT_FILES)]
  return groups + [[name] for name in names if suffix_of(name) != "txt"]


def _print_texts(names: list[str]) -> None:
  """Lists the texts in a source of images. They may be captions whose images are missing."""
  more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
  listed = printable(", ".join(map(posixpath.basename, names[:MOST_LISTED])))
  print(f"prepare_data: read as texts, because no image has these names: {listed}{more}.")


def _folders(files: Iterable[str], lists: Collection[str]) -> set[str]:
  """Returns the folders that contain at least one of the lists."""
  return {posixpath.dirname(name) for name in files if posixpath.basename(name) in lists}


def read(part: SourcePart, allow_outside: bool = False) -> Iterator[Record | Rejected]:
  """Yields the records of a part in a fixed order, with a `Rejected` in place of an invalid record.

  With `allow_outside`, records may name images outside the folder of their file.
  """
  readers: dict[str, Callable[..., Iterator[Record | Rejected]]]
  readers = {"folder": _folder, "webdataset": tar_samples, "parquet": parquet_rows, "text": _text}
  if part.kind == "sidecars":
    fs, root = open_source(part.files[0])
    files = [open_source(file)[1] for file in part.files[1:]]
    yield from folder_samples(fs, root, files, functools.partial(_with_images, fs, allow_outside))
    return
  for file in part.files:
    fs, path = open_source(file)
    yield from readers[part.kind](fs, path, functools.partial(_with_images, fs, allow_outside))


def _detect(found: Collection[str], files: Collection[str], source: str) -> list[str]:
  """Detects the formats of a source, in the order of their parts. `files` omits links."""
  lists = len(found) > 1 and any(posixpath.basename(file) in LISTS for file in files)
  images = [names for names in by_stem(found).values() if has_image(names)]
  if lists:
    return ["folder", "sidecars", "text"]
  if any(has_caption(names) for names in images):
    return ["sidecars", "text", "webdataset"]
  for kind, suffixes in SUFFIXES.items():
    if any(file.lower().endswith(suffixes) for file in found):
      return ["sidecars", kind] if images and kind == "text" else [kind]
  first = posixpath.basename(next(iter(found)))
  raise UserError(
    f"config.raw.source is '{source}', whose files have no texts and no captions ({first}, ...); "
    "a folder of images must have the caption of x.jpg in x.txt, x.caption or x.json, or all "
    f"captions in {PAIR_FILES[0]}."
  )


def _url(fs: fsspec.AbstractFileSystem, path: str) -> str:
  return path if "file" in fs.protocol else fs.unstrip_protocol(path)


def _folder(
  fs: fsspec.AbstractFileSystem, path: str, images: Callable
) -> Iterator[Record | Rejected]:
  """Yields the records of a folder that has at least one of the files `LISTS`.

  The order is: the list of captions (JSONL or CSV), texts.jsonl, interleaved.jsonl, and then images
  that are in no list but have a caption file.
  """
  known, named = set(fs.find(path)), set()
  listed = [name for name in LISTS if posixpath.join(path, name) in known]
  for name in listed:
    if not _is_regular(fs, file := posixpath.join(path, name)):
      message = f"{file} is a link or not a file, and is not read: replace it by the file itself."
      yield Rejected(file, "", "linked_file", message)
  listed = [name for name in listed if _is_regular(fs, posixpath.join(path, name))]
  captions = next((name for name in PAIR_FILES if name in listed), None)
  if captions:
    file = posixpath.join(path, captions)
    is_csv, fields = captions.endswith(".csv"), required_fields(RawPair)
    rows = csv_rows(fs, file) if is_csv else json_lines(fs, file, fields)
    for where, values in rows:
      if isinstance(values, Rejected):
        yield values
        continue
      values = renamed(values)
      named.add(_joined(path, values.get("image")))
      if captions != PAIR_FILES[0]:
        values["key"] = key_of(values, values.get("image"))
      yield images(checked_record(RawPair, values, file, where), path, where, known)
  for name, cls in ((TEXTS, RawText), (INTERLEAVED, RawInterleaved)):
    if name in listed:
      file = posixpath.join(path, name)
      for where, values in json_lines(fs, file, required_fields(cls)):
        item = values if isinstance(values, Rejected) else checked_record(cls, values, file, where)
        if isinstance(item, Record):
          named.update(_joined(path, image) for image in images_of(item))
        yield images(item, path, where, known)
  if any(name in IMAGE_LISTS for name in listed):
    yield from folder_samples(fs, path, _unnamed(path, known, named), images)


def _joined(folder: str, image: Any) -> str:
  """Returns the full path of an image that a list in `folder` names, or "" if it is not a path."""
  return posixpath.normpath(posixpath.join(folder, image)) if isinstance(image, str) else ""


def _unnamed(path: str, known: Collection[str], named: set[str]) -> list[str]:
  """Returns images that are in no list, and their caption files. Skips subfolders with lists."""
  inner = _folders(known, IMAGE_LISTS) - {path}
  stems = by_stem(f for f in sorted(known) if not is_in(f, inner))
  samples = (names for names in stems.values() if has_image(names) and has_caption(names))
  return [name for names in samples if named.isdisjoint(names) for name in names]


def _is_regular(fs: fsspec.AbstractFileSystem, path: str) -> bool:
  """Returns whether a path is a regular file, which excludes links and pipes."""
  try:
    info = fs.info(path)
  except OSError:  # A broken link.
    return False
  return info["type"] == "file" and not info.get("islink")


def _with_images(
  fs: fsspec.AbstractFileSystem,
  allow_outside: bool,
  item: Record | Rejected,
  folder: str,
  where: str,
  known: Collection[str] = (),
) -> Record | Rejected:
  """Makes the image paths of a record absolute. Returns `Rejected` if an image is invalid.

  Paths are relative to `folder`. Files in `known` exist and are not looked up. Paths that lead out
  of the folder are rejected without a look-up, so that no message reveals which files exist.
  """
  if isinstance(item, Rejected):
    return item
  images, full = ImageFolder(_url(fs, folder), REMEDY, allow_outside), []
  for name in images_of(item):
    if isinstance(name, str):
      place = f"{where}, key '{item.key}'"
      try:
        path = images.find(name, place)
      except UserError as error:
        return Rejected(where.split(", line")[0], item.key, "outside_image", str(error))
      if fs._strip_protocol(path) not in known and not fs.exists(path):
        message = (
          f"{place}: image '{name}' does not exist; give its path relative to {images.path}."
        )
        return Rejected(where.split(", line")[0], item.key, "missing_image", message)
      name = path
    full.append(name)
  return with_images(item, full)


def _text(
  fs: fsspec.AbstractFileSystem, file: str, images: Callable
) -> Iterator[Record | Rejected]:
  """Yields one text for a .txt file, or a text or document per line of a .jsonl file."""
  name = posixpath.basename(file)
  if suffix_of(file) == "txt":
    try:
      text = decode(fs.cat_file(file), file)
    except RecordError as error:
      yield Rejected(file, name, error.reason, str(error))
      return
    yield checked_record(RawText, {"key": name, "text": text, "source": file}, file, file)
    return
  for number, (where, values) in enumerate(json_lines(fs, file, required_fields(RawText))):
    if isinstance(values, Rejected):
      yield values
      continue
    values = renamed(values)
    values = {"source": file, **values, "key": key_of(values, f"{name}/{number}")}
    cls = RawInterleaved if "segments" in values else RawText
    yield images(checked_record(cls, values, file, where), posixpath.dirname(file), where)
