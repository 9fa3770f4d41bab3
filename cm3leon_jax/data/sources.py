"""Reads captioned folders, WebDataset tars, Parquet, JSONL and plain text as raw records.

A source is split into parts, each of which becomes a raw shard. Paths are local or in a bucket
(`gs://`), through fsspec; a glob pattern names many files.
"""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import functools
import hashlib
import os
import posixpath
from typing import Literal

from cm3leon_jax.config import UserError
from cm3leon_jax.data.records import (
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
from cm3leon_jax.data.source_archives import parquet_rows, tar_samples
from cm3leon_jax.data.source_lines import csv_rows, json_lines, whole_text
from cm3leon_jax.io import open_filesystem

Format = Literal["auto", "folder", "webdataset", "parquet", "text"]
PAIR_FILES = ("pairs.jsonl", "captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
TEXTS = "texts.jsonl"
INTERLEAVED = "interleaved.jsonl"
SUFFIXES = {"webdataset": (".tar",), "parquet": (".parquet",), "text": (".jsonl", ".txt")}
LISTS = (*PAIR_FILES, TEXTS, INTERLEAVED)
TEXT_FILES = 1_000  # Number of .txt files of one part.


# What file systems say of a file's content: checksums of buckets, the time of local files.
STAMPS = ("md5Hash", "ETag", "etag", "mtime")


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a source, which becomes a raw shard.

  Attributes:
    kind: a `Format` other than `auto`.
    files: one file; for `text` possibly many .txt files, for `folder` the folder.
    bytes: size of the files.
    modified: digest of when the files were modified, or of the checksums that a bucket has; it
      shows changes, too. A file of the same size and time counts as the same. Empty for built-in
      sources.
  """

  kind: str
  files: tuple[str, ...]
  bytes: int
  modified: str = dataclasses.field(default="", repr=False)

  def identity(self) -> dict:
    """Returns the fields on which the shard depends."""
    fields = dataclasses.asdict(self)
    return fields if self.modified else {k: v for k, v in fields.items() if k != "modified"}


def digest_of(parts: list[Part]) -> str:
  """Returns the SHA-256 of the parts of a source, which changes with their files."""
  stamps = "".join(part.modified for part in parts)
  return hashlib.sha256(f"{parts!r}{stamps}".encode()).hexdigest()


def parts(source: str, kind: str = "auto") -> list[Part]:
  """Splits `source` into parts, in a fixed order.

  A part is a tar, Parquet or JSONL file, a captioned folder, or up to 1,000 .txt files.

  Args:
    source: a folder, a file or a glob pattern, local or `gs://`.
    kind: a `Format`; `auto` reads it from the names of the files.

  Raises:
    UserError: the source has no files, or none of a known format.
  """
  fs, path = _filesystem(source)
  files = _files(fs, path, source)
  if kind == "auto":
    kind = _detect(files, source)

  def part(names: list[str], paths: list[str]) -> Part:
    sizes, stamps = zip(*(files[name] for name in names))
    modified = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]
    return Part(kind, tuple(_url(fs, p) for p in paths), sum(sizes), modified)

  if kind == "folder":
    names = {posixpath.dirname(name) for name in files if posixpath.basename(name) in LISTS}
    if not names:
      raise UserError(f"config.raw.source is '{source}', a folder without {', '.join(LISTS)}.")
    return [part([f for f in files if f.startswith(name + "/")], [name]) for name in sorted(names)]
  names = [name for name in files if name.endswith(SUFFIXES[kind])]
  if not names:
    suffixes = " or ".join(SUFFIXES[kind])
    raise UserError(
      f"config.raw.source is '{source}', which holds no {suffixes} file; format is '{kind}'."
    )
  texts = [name for name in names if name.endswith(".txt")]
  groups = [texts[i : i + TEXT_FILES] for i in range(0, len(texts), TEXT_FILES)]
  groups += [[name] for name in names if not name.endswith(".txt")]
  return [part(group, group) for group in groups]


def read(part: Part, allow_outside: bool = False) -> Iterator[Record | Rejected]:
  """Yields the records of a part in a fixed order, wrong ones as Rejected.

  Args:
    part: of a source.
    allow_outside: whether records may name images that are not in the folder of their file.
  """
  readers = {"folder": _folder, "webdataset": tar_samples, "parquet": parquet_rows, "text": _text}
  for file in part.files:
    fs, path = _filesystem(file)
    yield from readers[part.kind](fs, path, functools.partial(_with_images, fs, allow_outside))


def _filesystem(source: str):
  try:
    return open_filesystem(source)
  except UserError as error:
    raise UserError(f"config.raw.source: {error}") from error


def _files(fs, path: str, source: str) -> dict[str, tuple[int, str]]:
  """Lists the files at `path`, in the order of their names: size, and checksum or time."""
  entries = {}
  if any(c in path for c in "*?["):
    entries = fs.glob(path, detail=True)
  elif fs.exists(path):
    entries = fs.find(path, detail=True)
  files = {
    name: (int(about.get("size") or 0), next((str(about[s]) for s in STAMPS if s in about), ""))
    for name, about in sorted(entries.items())
    if about["type"] == "file"
  }
  if not files:
    raise UserError(
      f"config.raw.source is '{source}', which has no files; it must be 'openmoji' or 'scenes', or "
      "a folder, a file or a glob pattern of WebDataset tars, Parquet, JSONL or text, or a folder "
      f"with {PAIR_FILES[0]}."
    )
  return files


def _detect(files: dict[str, int], source: str) -> str:
  if len(files) > 1 and any(posixpath.basename(file) in LISTS for file in files):
    return "folder"
  for kind, suffixes in SUFFIXES.items():
    if any(file.endswith(suffixes) for file in files):
      return kind
  first = posixpath.basename(next(iter(files)))
  raise UserError(
    f"config.raw.source is '{source}', whose files are of no known kind ({first}, ...); a folder "
    f"of images must hold their captions in {PAIR_FILES[0]}."
  )


def _url(fs, path: str) -> str:
  return path if "file" in fs.protocol else fs.unstrip_protocol(path)


def _folder(fs, path: str, images: Callable) -> Iterator[Record | Rejected]:
  """Yields images with captions in a JSONL or CSV file, then texts.jsonl, interleaved.jsonl."""
  known = set(fs.find(path))
  listed = [name for name in LISTS if posixpath.join(path, name) in known]
  for name in listed:
    if not _is_regular(fs, file := posixpath.join(path, name)):
      message = f"{file} is a link, or no file, and is not read: put the file itself there."
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
      if captions != PAIR_FILES[0]:
        values["key"] = key_of(values, values.get("image"))
      yield images(checked_record(RawPair, values, file, where), path, where, known)
  for name, cls in ((TEXTS, RawText), (INTERLEAVED, RawInterleaved)):
    if name in listed:
      file = posixpath.join(path, name)
      for where, values in json_lines(fs, file, required_fields(cls)):
        item = values if isinstance(values, Rejected) else checked_record(cls, values, file, where)
        yield images(item, path, where, known)


def _is_regular(fs, path: str) -> bool:
  """Returns whether a path is a file: no link, which may lead out of a folder, and no pipe."""
  try:
    info = fs.info(path)
  except OSError:  # A link that leads nowhere.
    return False
  return info["type"] == "file" and not info.get("islink")


def _with_images(
  fs,
  allow_outside: bool,
  item: Record | Rejected,
  folder: str,
  where: str,
  known: Collection[str] = (),
) -> Record | Rejected:
  """Makes paths of images in `folder` full paths; `known` files need no look-up.

  A path out of the folder is refused before it is looked up: no message may say whether another
  file of the machine exists.
  """
  if isinstance(item, Rejected):
    return item
  full = []
  for name in images_of(item):
    if isinstance(name, str):
      path = name if posixpath.isabs(name) else posixpath.normpath(posixpath.join(folder, name))
      if not allow_outside and not _is_inside(fs, path, folder):
        message = (
          f"{where}, key '{item.key}': image '{name}' is not in {folder}; "
          "config.raw.allow_outside=True takes images from everywhere."
        )
        return Rejected(where.split(", line")[0], item.key, "outside_image", message)
      if path not in known and not fs.exists(path):
        message = (
          f"{where}, key '{item.key}': image '{name}' does not exist; give its path relative to "
          f"{folder}."
        )
        return Rejected(where.split(", line")[0], item.key, "missing_image", message)
      name = _url(fs, path)
    full.append(name)
  return with_images(item, full)


def _is_inside(fs, path: str, folder: str) -> bool:
  """Returns whether a path is in a folder, links followed."""
  if "\0" in path:
    return False
  if "file" in fs.protocol:
    path, folder = os.path.realpath(path), os.path.realpath(folder)
  return posixpath.normpath(path).startswith(posixpath.normpath(folder).rstrip("/") + "/")


def _text(fs, file: str, images: Callable) -> Iterator[Record | Rejected]:
  """Yields a .txt file as a text, or lines of a .jsonl file: texts, or documents of `segments`."""
  name = posixpath.basename(file)
  if file.endswith(".txt"):
    try:
      text = whole_text(fs, file)
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
