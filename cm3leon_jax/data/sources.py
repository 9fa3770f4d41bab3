"""What users have (captioned folders, WebDataset tars, Parquet, JSONL, plain text) as parts, each a stream of raw records.

Paths may be local or in a bucket (`gs://`), through fsspec; a glob pattern names many files.
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
# What other tools call our fields, in the order in which they are looked for.
ALIASES = {
  "image": ("image", "file_name", "image_path", "path", "jpg", "png", "image_bytes", "bytes"),
  "caption": ("caption", "text", "TEXT", "txt"),
  "source": ("source", "url", "URL"),
  "license": ("license", "licence", "LICENSE"),
  "attribution": ("attribution", "author", "credit"),
  "key": ("key", "id"),
}
PARQUET_ROWS = 64
TEXT_FILES = 1_000  # .txt files of one part

Item = Record | Rejected


@dataclasses.dataclass(frozen=True)
class Part:
  """A share of a source that is read by itself.

  Attributes:
    kind: a `Format`, but `auto`.
    files: a file each, but for `text` (.txt files one text each) and `folder` (the folder).
    bytes: size of the files; with their names it tells whether they changed.
  """

  kind: str
  files: tuple[str, ...]
  bytes: int


def parts(source: str, kind: str = "auto") -> list[Part]:
  """The parts of `source` in a fixed order: a tar, Parquet or JSONL file, a captioned folder, up to 1,000 .txt files.

  Args:
    source: a folder, a file or a glob pattern, local or `gs://`.
    kind: a `Format`; `auto` tells it from the names of the files.

  Raises:
    UserError: nothing is there, or nothing that is known.
  """
  fs, path = _filesystem(source)
  files = _files(fs, path, source)
  if kind == "auto":
    kind = _detect(files, source)
  part = lambda names: Part(
    kind, tuple(_url(fs, name) for name in names), sum(files[name] for name in names)
  )
  if kind == "folder":
    found = sorted({posixpath.dirname(name) for name in files if posixpath.basename(name) in LISTS})
    if not found:
      raise UserError(f"config.raw.source is '{source}', a folder without {', '.join(LISTS)}.")
    inside = lambda folder: [name for name in files if name.startswith(folder + "/")]
    return [
      dataclasses.replace(part(inside(folder)), files=(_url(fs, folder),)) for folder in found
    ]
  wanted = [name for name in files if name.endswith(SUFFIXES[kind])]
  if not wanted:
    raise UserError(
      f"config.raw.source is '{source}', which holds no {' or '.join(SUFFIXES[kind])} file; format is '{kind}'."
    )
  texts = [name for name in wanted if name.endswith(".txt")]
  single = [part([name]) for name in wanted if not name.endswith(".txt")]
  return [part(texts[i : i + TEXT_FILES]) for i in range(0, len(texts), TEXT_FILES)] + single


def read(part: Part) -> Iterator[Item]:
  """The records of a part in a fixed order, those that are wrong as Rejected."""
  reader = {"folder": _folder, "webdataset": _webdataset, "parquet": _parquet, "text": _text}[
    part.kind
  ]
  for file in part.files:
    fs, path = _filesystem(file)
    yield from reader(fs, path)


def _filesystem(source: str):
  try:
    return fsspec.core.url_to_fs(source)
  except (ImportError, ValueError) as error:
    raise UserError(
      f"config.raw.source is '{source}', which cannot be opened: {error} (buckets need pip install 'cm3leon_jax[data]')."
    ) from error


def _files(fs, path: str, source: str) -> dict[str, int]:
  """Names and sizes of the files at `path`, in the order of their names."""
  found = (
    fs.glob(path, detail=True)
    if any(c in path for c in "*?[")
    else fs.find(path, detail=True)
    if fs.exists(path)
    else {}
  )
  files = {
    name: int(found[name].get("size") or 0)
    for name in sorted(found)
    if found[name]["type"] == "file"
  }
  if not files:
    raise UserError(
      f"config.raw.source is '{source}', where no file is; it must be 'openmoji', or a folder, a file or a glob pattern of "
      f"WebDataset tars, Parquet, JSONL or text, or a folder that holds {PAIR_FILES[0]}."
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
    f"config.raw.source is '{source}', whose files are of no known kind ({first}, ...); a folder of images must hold their "
    f"captions in {PAIR_FILES[0]}."
  )


def _url(fs, path: str) -> str:
  return path if "file" in fs.protocol else fs.unstrip_protocol(path)


def _renamed(values: dict) -> dict:
  """Our fields out of another tool's: the first alias that is there and not None."""
  found = dict(values)
  for name, aliases in ALIASES.items():
    value = next((values[a] for a in aliases if values.get(a) is not None), None)
    if value is not None:
      found[name] = value
  return found


def _record(cls, values: dict, file: str, where: str) -> Item:
  try:
    return make_record(cls, values, where)
  except RecordError as error:
    return Rejected(file, str(values.get("key") or ""), error.reason, str(error))


def _lines(fs, file: str, cls) -> Iterator[tuple[str, dict | Rejected]]:
  """(where, fields) of every line of a JSONL file that is not blank."""
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
  """Images with their captions in a JSONL or CSV file beside them, texts.jsonl, interleaved.jsonl."""
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
  """A record whose images are paths in `folder`, with full paths instead; `known` files are not looked for."""
  if isinstance(item, Rejected):
    return item
  full = []
  for name in images_of(item):
    if isinstance(name, str):
      path = name if posixpath.isabs(name) else posixpath.normpath(posixpath.join(folder, name))
      if path not in known and not fs.exists(path):
        message = f"{where}, key '{item.key}': image '{name}' does not exist; give its path relative to {folder}."
        return Rejected(where.split(", line")[0], item.key, "missing_image", message)
      name = _url(fs, path)
    full.append(name)
  return with_images(item, full)


def _webdataset(fs, file: str) -> Iterator[Item]:
  """A tar of samples, as img2dataset writes them: members of one stem are an image, .txt and/or .json."""
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
    yield Rejected(
      file,
      "",
      "unreadable_file",
      f"{file} cannot be read to its end ({error}); it must be a whole tar file.",
    )


def _sample(file: str, stem: str, sample: dict[str, bytes]) -> Iterator[Item]:
  if not sample:
    return
  where = f"{file}, sample '{stem}'"
  try:
    about = json.loads(sample.get("json", b"{}"))
    about = about if isinstance(about, dict) else {}
    caption = sample["txt"].decode("utf-8") if "txt" in sample else None
  except ValueError as error:
    yield Rejected(
      file,
      stem,
      "malformed_record",
      f"{where}: its text is not readable ({error}); it must be UTF-8 and JSON.",
    )
    return
  values = {k: str(v) for k, v in _renamed(about).items() if v is not None}
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
  """Rows with a caption and an image: bytes, a path beside the file, or {"bytes", "path"} as in Hugging Face datasets."""
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
    yield Rejected(
      file,
      "",
      "unreadable_file",
      f"{file} cannot be read to its end ({error}); it must be a Parquet file.",
    )


def _parquet_values(row: dict, key: str) -> dict:
  values = _renamed(row)
  image = values.get("image")
  if isinstance(image, dict):
    image = image.get("bytes") or image.get("path")
  values["image"] = image
  values["key"] = str(values.get("key") or key)
  return {k: v for k, v in values.items() if v is not None}


def _text(fs, file: str) -> Iterator[Item]:
  """A .txt file is a text; a line of a .jsonl file is a text in its field `text`, or an interleaved document (`segments`)."""
  name = posixpath.basename(file)
  if file.endswith(".txt"):
    try:
      text = fs.cat_file(file).decode("utf-8")
    except UnicodeDecodeError as error:
      yield Rejected(
        file, name, "malformed_record", f"{file} is not UTF-8 ({error}); save it as UTF-8."
      )
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
