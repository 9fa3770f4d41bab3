"""Reads captioned folders, WebDataset tars, Parquet, JSONL and plain text as raw records.

A source is split into parts, each of which becomes a raw shard. Paths are local or in a bucket
(`gs://`), through fsspec; a glob pattern names many files.
"""

from collections.abc import Callable, Collection, Iterator
import dataclasses
import functools
import hashlib
import json
import os
import posixpath
import tarfile
from typing import Literal

import fsspec

from cm3leon_jax.config import UserError
from cm3leon_jax.data.records import (
  RawInterleaved,
  RawPair,
  RawText,
  Record,
  RecordError,
  Rejected,
  images_of,
  make_record,
  with_images,
)
from cm3leon_jax.data.source_lines import csv_rows, json_lines, whole_text

Format = Literal["auto", "folder", "webdataset", "parquet", "text"]
PAIR_FILES = ("pairs.jsonl", "captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
TEXTS = "texts.jsonl"
INTERLEAVED = "interleaved.jsonl"
SUFFIXES = {"webdataset": (".tar",), "parquet": (".parquet",), "text": (".jsonl", ".txt")}
LISTS = (*PAIR_FILES, TEXTS, INTERLEAVED)
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "avif")
SAMPLE_SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json")  # Other members of a tar are not read.
MAX_MEMBER = 2**26  # Bytes of a file in a tar.
# Names of our fields in other tools, in order of preference.
ALIASES = {
  "image": ("image", "file_name", "image_path", "path", "jpg", "png", "image_bytes", "bytes"),
  "caption": ("caption", "text", "TEXT", "txt"),
  "source": ("source", "url", "URL"),
  "license": ("license", "licence", "LICENSE"),
  "attribution": ("attribution", "author", "credit"),
  "key": ("key", "id"),
}
PARQUET_ROWS = 64
TEXT_FILES = 1_000  # Number of .txt files of one part.

Item = Record | Rejected


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


def read(part: Part, allow_outside: bool = False) -> Iterator[Item]:
  """Yields the records of a part in a fixed order, wrong ones as Rejected.

  Args:
    part: of a source.
    allow_outside: whether records may name images that are not in the folder of their file.
  """
  readers = {"folder": _folder, "webdataset": _webdataset, "parquet": _parquet, "text": _text}
  for file in part.files:
    fs, path = _filesystem(file)
    yield from readers[part.kind](fs, path, functools.partial(_with_images, fs, allow_outside))


def _filesystem(source: str):
  try:
    return fsspec.core.url_to_fs(source)
  except (ImportError, ValueError) as error:
    raise UserError(
      f"config.raw.source is '{source}', which cannot be opened: {error} (buckets need "
      "pip install 'cm3leon_jax[data]')."
    ) from error


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


def _renamed(values: dict) -> dict:
  """Adds our fields under their names, each from its first alias that is not None."""
  renamed = dict(values)
  for name, aliases in ALIASES.items():
    value = next((values[a] for a in aliases if values.get(a) is not None), None)
    if value is not None:
      renamed[name] = value
  return renamed


def _record(cls, values: dict, file: str, where: str) -> Item:
  try:
    return make_record(cls, values, where)
  except RecordError as error:
    return Rejected(file, str(values.get("key") or ""), error.reason, str(error))


def _folder(fs, path: str, images: Callable) -> Iterator[Item]:
  """Yields images with captions in a JSONL or CSV file, then texts.jsonl, interleaved.jsonl."""
  known = set(fs.find(path))
  listed = {posixpath.basename(name) for name in known if posixpath.dirname(name) == path}
  captions = next((name for name in PAIR_FILES if name in listed), None)
  if captions:
    file = posixpath.join(path, captions)
    rows = csv_rows(fs, file) if captions.endswith(".csv") else json_lines(fs, file, RawPair)
    for where, values in rows:
      if isinstance(values, Rejected):
        yield values
        continue
      values = _renamed(values)
      if captions != PAIR_FILES[0] and not values.get("key"):
        values["key"] = values.get("image")
      yield images(_record(RawPair, values, file, where), path, where, known)
  for name, cls in ((TEXTS, RawText), (INTERLEAVED, RawInterleaved)):
    if name in listed:
      file = posixpath.join(path, name)
      for where, values in json_lines(fs, file, cls):
        item = values if isinstance(values, Rejected) else _record(cls, values, file, where)
        yield images(item, path, where, known)


def _with_images(
  fs, allow_outside: bool, item: Item, folder: str, where: str, known: Collection[str] = ()
) -> Item:
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


def _webdataset(fs, file: str, images: Callable) -> Iterator[Item]:
  """Yields the samples of a tar by img2dataset: an image, .txt and .json of one stem."""
  del images  # They are in the tar.
  try:
    # A compressed tar could be a thousand times as large as its file.
    most = fs.size(file)
    with fs.open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
      stem, sample = "", {}
      for member in tar:
        if not member.isfile():
          continue
        folder, name = posixpath.split(member.name)
        base, _, suffix = name.partition(".")
        suffix = suffix.lower()
        if posixpath.join(folder, base) != stem:
          yield from _sample(file, stem, sample)
          stem, sample = posixpath.join(folder, base), {}
        if member.size > MAX_MEMBER:
          message = f"{file}, {member.name} has {member.size:,} bytes; it may have {MAX_MEMBER:,}."
          yield Rejected(file, stem, "large_file", message)
          if member.size > most and not member.issparse():
            raise EOFError(f"it has {most:,} bytes")  # tarfile would look for the rest for minutes.
        elif suffix in SAMPLE_SUFFIXES:
          sample[suffix] = tar.extractfile(member).read()
      yield from _sample(file, stem, sample)
  except Exception as error:  # tarfile raises errors of any kind at wrong headers.
    message = (
      f"{file} cannot be read to its end ({error}); it must be a whole tar file, not compressed."
    )
    yield Rejected(file, "", "unreadable_file", message)


def _sample(file: str, stem: str, sample: dict[str, bytes]) -> Iterator[Item]:
  if not sample:
    return
  where = f"{file}, sample '{stem}'"
  try:
    about = json.loads(sample.get("json", b"{}"))
    about = about if isinstance(about, dict) else {}
    caption = sample["txt"].decode("utf-8") if "txt" in sample else None
  except (ValueError, RecursionError) as error:
    message = f"{where}: its text is not readable ({error}); it must be UTF-8 and JSON."
    yield Rejected(file, stem, "malformed_record", message)
    return
  values = {k: v if k == "facts" else str(v) for k, v in _renamed(about).items() if v is not None}
  values = {"source": file, **values, "key": stem}
  values.pop("image", None)
  if caption is not None:
    values["caption"] = caption
  image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
  if image is not None:
    yield _record(RawPair, {**values, "image": image}, file, where)
  elif "caption" in values:
    message = f"{where} has no image; it must have one of .{', .'.join(IMAGE_SUFFIXES)}."
    yield Rejected(file, stem, "missing_image", message)
  else:
    message = f"{where} has no image and no caption, but {', '.join(sample)}."
    yield Rejected(file, stem, "malformed_record", message)


def _parquet(fs, file: str, images: Callable) -> Iterator[Item]:
  """Yields rows with a caption and an image: bytes, a path, or a dict of both (Hugging Face)."""
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f"{file} needs pyarrow ({error}): pip install 'cm3leon_jax[data]'.") from error
  folder = posixpath.dirname(file)
  try:
    with fs.open(file, "rb") as stream:
      number = 0
      for batch in parquet.ParquetFile(stream).iter_batches(PARQUET_ROWS):
        for row in _rows_of(batch):
          where = f"{file}, row {number}"
          if isinstance(row, Exception):
            message = f"{where} cannot be read ({row})."
            yield Rejected(file, str(number), "malformed_record", message)
            number += 1
            continue
          values = _parquet_values(row, f"{posixpath.basename(file)}/{number}")
          number += 1
          if "image" not in values and "text" in row and isinstance(row["text"], str):
            yield _record(RawText, {**values, "text": row["text"]}, file, where)
            continue
          item = _record(RawPair, values, file, where)
          yield images(item, folder, where)
  except Exception as error:  # pyarrow raises errors of any kind at damaged files.
    message = f"{file} cannot be read to its end ({error}); it must be a Parquet file."
    yield Rejected(file, "", "unreadable_file", message)


def _rows_of(batch) -> Iterator[dict | Exception]:
  """Yields the rows of a batch, and the error of each one that cannot be read."""
  for i in range(batch.num_rows):
    try:
      [row] = batch.slice(i, 1).to_pylist()
      yield row
    except Exception as error:  # Bytes that are no UTF-8, dates out of range, ...
      yield error


def _parquet_values(row: dict, key: str) -> dict:
  values = _renamed(row)
  image = values.get("image")
  if isinstance(image, dict):
    image = image.get("bytes") or image.get("path")
  values["image"] = image
  values["key"] = str(values.get("key") or key)
  return {k: v for k, v in values.items() if v is not None}


def _text(fs, file: str, images: Callable) -> Iterator[Item]:
  """Yields a .txt file as a text, or lines of a .jsonl file: texts, or documents of `segments`."""
  name = posixpath.basename(file)
  if file.endswith(".txt"):
    try:
      text = whole_text(fs, file)
    except RecordError as error:
      yield Rejected(file, name, error.reason, str(error))
      return
    yield _record(RawText, {"key": name, "text": text, "source": file}, file, file)
    return
  for number, (where, values) in enumerate(json_lines(fs, file, RawText)):
    if isinstance(values, Rejected):
      yield values
      continue
    values = _renamed(values)
    values = {"source": file, **values, "key": str(values.get("key") or f"{name}/{number}")}
    cls = RawInterleaved if "segments" in values else RawText
    yield images(_record(cls, values, file, where), posixpath.dirname(file), where)
