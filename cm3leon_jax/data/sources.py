"""What users have (captioned folders, WebDataset tars, Parquet, JSONL, plain text) as one stream of raw records.

Paths may be local or in a bucket (`gs://`), through fsspec; a glob pattern names many files.
"""

from collections.abc import Iterator
import csv
import json
import posixpath
import tarfile

import fsspec

from cm3leon_jax.config import UserError
from cm3leon_jax.data.records import RawPair, RawText, RecordError, Rejected, make_record, parse_json, required_fields

FORMATS = ("auto", "folder", "webdataset", "parquet", "text")
PAIR_FILES = ("pairs.jsonl", "captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
TEXTS = "texts.jsonl"
SUFFIXES = {"webdataset": (".tar",), "parquet": (".parquet",), "text": (".jsonl", ".txt")}
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

Item = RawPair | RawText | Rejected


def read(source: str, kind: str = "auto") -> Iterator[Item]:
  """The records of `source` in a fixed order, those that are wrong as Rejected.

  Args:
    source: a folder, a file or a glob pattern, local or `gs://`.
    kind: one of FORMATS; `auto` tells it from the names of the files.

  Raises:
    UserError: nothing is there, or nothing that is known.
  """
  fs, path = _filesystem(source)
  files = _files(fs, path, source)
  if kind == "auto":
    kind = _detect(files, path, source)
  if kind == "folder":
    yield from _folder(fs, path, files, source)
    return
  reader = {"webdataset": _webdataset, "parquet": _parquet, "text": _text}[kind]
  wanted = [file for file in files if file.endswith(SUFFIXES[kind])]
  if not wanted:
    raise UserError(f"config.raw.source is '{source}', which holds no {' or '.join(SUFFIXES[kind])} file; format is '{kind}'.")
  for file in wanted:
    yield from reader(fs, file)


def _filesystem(source: str):
  try:
    return fsspec.core.url_to_fs(source)
  except (ImportError, ValueError) as error:
    raise UserError(f"config.raw.source is '{source}', which cannot be opened: {error}.") from error


def _files(fs, path: str, source: str) -> list[str]:
  files = sorted(fs.glob(path)) if any(c in path for c in "*?[") else sorted(fs.find(path)) if fs.exists(path) else []
  if not files:
    raise UserError(
      f"config.raw.source is '{source}', where no file is; it must be 'openmoji', or a folder, a file or a glob pattern of "
      f"WebDataset tars, Parquet, JSONL or text, or a folder that holds {PAIR_FILES[0]}."
    )
  return files


def _detect(files: list[str], path: str, source: str) -> str:
  inside = {posixpath.relpath(file, path) for file in files}
  if inside & {*PAIR_FILES, TEXTS}:
    return "folder"
  for kind, suffixes in SUFFIXES.items():
    if any(file.endswith(suffixes) for file in files):
      return kind
  raise UserError(
    f"config.raw.source is '{source}', whose files are of no known kind ({posixpath.basename(files[0])}, ...); a folder of "
    f"images must hold their captions in {PAIR_FILES[0]}."
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


def _folder(fs, path: str, files: list[str], source: str) -> Iterator[Item]:
  """Images with their captions in a JSONL or CSV file beside them, and texts.jsonl."""
  names = {posixpath.relpath(file, path): file for file in files}
  captions = next((name for name in PAIR_FILES if name in names), None)
  if captions is None and TEXTS not in names:
    raise UserError(f"config.raw.source is '{source}', a folder without {', '.join(PAIR_FILES)} or {TEXTS}.")
  if captions:
    is_csv = captions.endswith(".csv")
    rows = _csv_rows(fs, names[captions]) if is_csv else _lines(fs, names[captions], RawPair)
    for where, values in rows:
      if isinstance(values, Rejected):
        yield values
        continue
      values = _renamed(values)
      if captions != PAIR_FILES[0] and not values.get("key"):
        values["key"] = values.get("image")
      yield _with_image(_record(RawPair, values, names[captions], where), fs, path, names, where)
  if TEXTS in names:
    for where, values in _lines(fs, names[TEXTS], RawText):
      yield values if isinstance(values, Rejected) else _record(RawText, values, names[TEXTS], where)


def _with_image(item: Item, fs, path: str, names: dict, where: str) -> Item:
  """A pair whose image is a path in `path`, as a full path."""
  if not isinstance(item, RawPair):
    return item
  name = posixpath.normpath(item.image)
  full = names.get(name, name if posixpath.isabs(name) else posixpath.join(path, name))
  if name not in names and not fs.exists(full):
    message = f"{where}, key '{item.key}': image '{item.image}' does not exist; give its path relative to {path}."
    return Rejected(where.split(", line")[0], item.key, "missing_image", message)
  return RawPair(**{**vars(item), "image": _url(fs, full)})


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
    yield Rejected(file, "", "unreadable_file", f"{file} cannot be read to its end ({error}); it must be a whole tar file.")


def _sample(file: str, stem: str, sample: dict[str, bytes]) -> Iterator[Item]:
  if not sample:
    return
  where = f"{file}, sample '{stem}'"
  try:
    about = json.loads(sample.get("json", b"{}"))
    about = about if isinstance(about, dict) else {}
    caption = sample["txt"].decode("utf-8") if "txt" in sample else None
  except ValueError as error:
    yield Rejected(file, stem, "malformed_record", f"{where}: its text is not readable ({error}); it must be UTF-8 and JSON.")
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
          is_path = isinstance(item, RawPair) and isinstance(item.image, str)
          yield _with_image(item, fs, folder, {}, where) if is_path else item
  except (pa.ArrowInvalid, OSError) as error:
    yield Rejected(file, "", "unreadable_file", f"{file} cannot be read to its end ({error}); it must be a Parquet file.")


def _parquet_values(row: dict, key: str) -> dict:
  values = _renamed(row)
  image = values.get("image")
  if isinstance(image, dict):
    image = image.get("bytes") or image.get("path")
  values["image"] = image
  values["key"] = str(values.get("key") or key)
  return {k: v for k, v in values.items() if v is not None}


def _text(fs, file: str) -> Iterator[Item]:
  """Texts: a .txt file is one, a .jsonl file has one a line in its field `text`."""
  name = posixpath.basename(file)
  if file.endswith(".txt"):
    try:
      text = fs.cat_file(file).decode("utf-8")
    except UnicodeDecodeError as error:
      yield Rejected(file, name, "malformed_record", f"{file} is not UTF-8 ({error}); save it as UTF-8.")
      return
    yield _record(RawText, {"key": name, "text": text, "source": file}, file, file)
    return
  for number, (where, values) in enumerate(_lines(fs, file, RawText)):
    if isinstance(values, Rejected):
      yield values
    else:
      values = _renamed(values)
      values = {"source": file, **values, "key": str(values.get("key") or f"{name}/{number}")}
      yield _record(RawText, values, file, where)
