"""Reads captioned folders, WebDataset tars, Parquet, JSONL and plain text as raw records.

A source is split into parts, each of which becomes a raw shard. Paths are local or in a bucket
(`gs://`), through fsspec; a glob pattern names many files.
"""

from collections.abc import Collection, Iterator
import csv
import dataclasses
import json
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
  parse_json,
  required_fields,
  with_images,
)

Format = Literal["auto", "folder", "webdataset", "parquet", "text"]
PAIR_FILES = ("pairs.jsonl", "captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
TEXTS = "texts.jsonl"
INTERLEAVED = "interleaved.jsonl"
SUFFIXES = {"webdataset": (".tar",), "parquet": (".parquet",), "text": (".jsonl", ".txt")}
LISTS = (*PAIR_FILES, TEXTS, INTERLEAVED)
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
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


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a source, which becomes a raw shard.

  Attributes:
    kind: a `Format` other than `auto`.
    files: one file; for `text` possibly many .txt files, for `folder` the folder.
    bytes: size of the files, which shows changes.
  """

  kind: str
  files: tuple[str, ...]
  bytes: int


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
    return Part(kind, tuple(_url(fs, p) for p in paths), sum(files[name] for name in names))

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


def read(part: Part) -> Iterator[Item]:
  """Yields the records of a part in a fixed order, wrong ones as Rejected."""
  readers = {"folder": _folder, "webdataset": _webdataset, "parquet": _parquet, "text": _text}
  for file in part.files:
    fs, path = _filesystem(file)
    yield from readers[part.kind](fs, path)


def _filesystem(source: str):
  try:
    return fsspec.core.url_to_fs(source)
  except (ImportError, ValueError) as error:
    raise UserError(
      f"config.raw.source is '{source}', which cannot be opened: {error} (buckets need "
      "pip install 'cm3leon_jax[data]')."
    ) from error


def _files(fs, path: str, source: str) -> dict[str, int]:
  """Lists the files at `path` and their sizes, in the order of their names."""
  entries = {}
  if any(c in path for c in "*?["):
    entries = fs.glob(path, detail=True)
  elif fs.exists(path):
    entries = fs.find(path, detail=True)
  files = {n: int(x.get("size") or 0) for n, x in sorted(entries.items()) if x["type"] == "file"}
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


def _lines(fs, file: str, cls) -> Iterator[tuple[str, dict | Rejected]]:
  """Yields (where, fields) for every line of a JSONL file that is not blank."""
  try:
    text = fs.cat_file(file).decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{file} is not UTF-8 ({error}); save it as UTF-8.") from error
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      where = f"{file}, line {number}"
      try:
        yield where, parse_json(line, where, required_fields(cls))
      except RecordError as error:
        yield where, Rejected(file, "", error.reason, str(error))


def _csv_rows(fs, file: str) -> Iterator[tuple[str, dict]]:
  with fs.open(file, "rt", encoding="utf-8", newline="") as stream:
    rows = csv.DictReader(stream)
    for row in rows:
      yield f"{file}, line {rows.line_num}", {k: v for k, v in row.items() if k is not None}


def _folder(fs, path: str) -> Iterator[Item]:
  """Yields images with captions in a JSONL or CSV file, then texts.jsonl, interleaved.jsonl."""
  known = set(fs.find(path))
  listed = {posixpath.basename(name) for name in known if posixpath.dirname(name) == path}
  captions = next((name for name in PAIR_FILES if name in listed), None)
  if captions:
    file = posixpath.join(path, captions)
    rows = _csv_rows(fs, file) if captions.endswith(".csv") else _lines(fs, file, RawPair)
    for where, values in rows:
      if isinstance(values, Rejected):
        yield values
        continue
      values = _renamed(values)
      if captions != PAIR_FILES[0] and not values.get("key"):
        values["key"] = values.get("image")
      yield _with_images(_record(RawPair, values, file, where), fs, path, where, known)
  for name, cls in ((TEXTS, RawText), (INTERLEAVED, RawInterleaved)):
    if name in listed:
      file = posixpath.join(path, name)
      for where, values in _lines(fs, file, cls):
        item = values if isinstance(values, Rejected) else _record(cls, values, file, where)
        yield _with_images(item, fs, path, where, known)


def _with_images(item: Item, fs, folder: str, where: str, known: Collection[str] = ()) -> Item:
  """Makes paths of images in `folder` full paths; `known` files need no look-up."""
  if isinstance(item, Rejected):
    return item
  full = []
  for name in images_of(item):
    if isinstance(name, str):
      path = name if posixpath.isabs(name) else posixpath.normpath(posixpath.join(folder, name))
      if path not in known and not fs.exists(path):
        message = (
          f"{where}, key '{item.key}': image '{name}' does not exist; give its path relative to "
          f"{folder}."
        )
        return Rejected(where.split(", line")[0], item.key, "missing_image", message)
      name = _url(fs, path)
    full.append(name)
  return with_images(item, full)


def _webdataset(fs, file: str) -> Iterator[Item]:
  """Yields the samples of a tar by img2dataset: an image, .txt and .json of one stem."""
  try:
    with fs.open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
      stem, sample = "", {}
      for member in tar:
        if not member.isfile():
          continue
        folder, name = posixpath.split(member.name)
        base, _, suffix = name.partition(".")
        if posixpath.join(folder, base) != stem:
          yield from _sample(file, stem, sample)
          stem, sample = posixpath.join(folder, base), {}
        sample[suffix.lower()] = tar.extractfile(member).read()
      yield from _sample(file, stem, sample)
  except (tarfile.TarError, OSError, EOFError) as error:
    message = f"{file} cannot be read to its end ({error}); it must be a whole tar file."
    yield Rejected(file, "", "unreadable_file", message)


def _sample(file: str, stem: str, sample: dict[str, bytes]) -> Iterator[Item]:
  if not sample:
    return
  where = f"{file}, sample '{stem}'"
  try:
    about = json.loads(sample.get("json", b"{}"))
    about = about if isinstance(about, dict) else {}
    caption = sample["txt"].decode("utf-8") if "txt" in sample else None
  except ValueError as error:
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


def _parquet(fs, file: str) -> Iterator[Item]:
  """Yields rows with a caption and an image: bytes, a path, or a dict of both (Hugging Face)."""
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f"{file} needs pyarrow ({error}): pip install 'cm3leon_jax[data]'.") from error
  folder = posixpath.dirname(file)
  try:
    with fs.open(file, "rb") as stream:
      number = 0
      for batch in parquet.ParquetFile(stream).iter_batches(PARQUET_ROWS):
        for row in batch.to_pylist():
          where = f"{file}, row {number}"
          values = _parquet_values(row, f"{posixpath.basename(file)}/{number}")
          number += 1
          if "image" not in values and "text" in row and isinstance(row["text"], str):
            yield _record(RawText, {**values, "text": row["text"]}, file, where)
            continue
          item = _record(RawPair, values, file, where)
          yield _with_images(item, fs, folder, where)
  except (pa.ArrowInvalid, OSError) as error:
    message = f"{file} cannot be read to its end ({error}); it must be a Parquet file."
    yield Rejected(file, "", "unreadable_file", message)


def _parquet_values(row: dict, key: str) -> dict:
  values = _renamed(row)
  image = values.get("image")
  if isinstance(image, dict):
    image = image.get("bytes") or image.get("path")
  values["image"] = image
  values["key"] = str(values.get("key") or key)
  return {k: v for k, v in values.items() if v is not None}


def _text(fs, file: str) -> Iterator[Item]:
  """Yields a .txt file as a text, or lines of a .jsonl file: texts, or documents of `segments`."""
  name = posixpath.basename(file)
  if file.endswith(".txt"):
    try:
      text = fs.cat_file(file).decode("utf-8")
    except UnicodeDecodeError as error:
      message = f"{file} is not UTF-8 ({error}); save it as UTF-8."
      yield Rejected(file, name, "malformed_record", message)
      return
    yield _record(RawText, {"key": name, "text": text, "source": file}, file, file)
    return
  for number, (where, values) in enumerate(_lines(fs, file, RawText)):
    if isinstance(values, Rejected):
      yield values
      continue
    values = _renamed(values)
    values = {"source": file, **values, "key": str(values.get("key") or f"{name}/{number}")}
    cls = RawInterleaved if "segments" in values else RawText
    yield _with_images(_record(cls, values, file, where), fs, posixpath.dirname(file), where)
