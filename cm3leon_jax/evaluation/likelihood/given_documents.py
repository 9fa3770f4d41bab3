"""Reads the documents to score, from a JSONL file or from the folder of a document store.

All documents are checked before the first document is scored. To score them, documents are read
again in parts.
"""

from collections.abc import Collection, Iterator
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import os
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.encode import texts_of
from cm3leon_jax.data.documents.store import INDEX, Document, DocumentStore, Segment
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.image_folder import BY_FLAG, ImageFolder
from cm3leon_jax.data.sources.lines import file_lines
from cm3leon_jax.data.sources.records import (
  RawInterleaved,
  RawPair,
  RawText,
  Record,
  RecordError,
  images_of,
  make_record,
  parse_json,
)
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.runs import stages
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

FORMS = ("text", "image and caption", "segments")
BLOCK = 1_000_000  # Number of documents of a store whose lengths are checked at a time.


@dataclasses.dataclass(frozen=True)
class Checked:
  """Result of a check of documents.

  Attributes:
    pairs: number of documents that are a text followed by an image.
    digest: SHA-256, in hex, of everything in the documents that their scores depend on.
  """

  documents: int
  pairs: int
  digest: str


@dataclasses.dataclass(frozen=True)
class DocumentFile:
  """Documents of a JSONL file. Each line is a raw text, a raw pair or a raw interleaved document.

  Attributes:
    path: path of the file. Paths of images are relative to its folder.
    crop: how images become square, see `RawConfig.crop`.
    allow_outside: whether images may be outside of the folder of the file.
  """

  path: epath.Path
  layout: PromptLayout
  crop: str = "center"
  num_threads: int = 8
  allow_outside: bool = False

  def check(self) -> Checked:
    """Checks every line, and reads every image.

    Raises:
      UserError: the file is empty; a line is not a JSON object or is too long; a field is unknown,
        absent or empty; an image is absent, unreadable or not in the folder of the file; or a
        document takes more positions than the model was trained on. The message names the file and,
        if there is one, the line.
    """
    digest, documents, pairs = hashlib.sha256(self.crop.encode()), 0, 0
    for where, record in progress_bar(self._records(), "check", unit="doc", delay=2, leave=False):
      digest.update(json.dumps(dataclasses.asdict(record)).encode())
      needed = sum(len(self.layout.encode(text)) + 1 for text in texts_of(record))
      for image in images_of(record):
        digest.update(self._check_image(str(image), where))
        needed += self.layout.image_tokens + 1
      _check_length(f"{where}, key '{record.key}'", needed, self.layout.positions)
      documents += 1
      pairs += [kind for kind, _ in segments_of(record)] == ["text", "image"]
    if not documents:
      raise UserError(
        f"--documents names {self.path}, which is empty: give one JSON object per line."
      )
    return Checked(documents, pairs, digest.hexdigest())

  def parts(
    self, size: int, wanted: Collection[int], image_tokenizer: ImageTokenizer
  ) -> Iterator[tuple[int, list[Document]]]:
    """Yields (i, documents) for each wanted part i. Part i begins at document i * `size`."""
    records = (record for _, record in self._records())
    for number in itertools.count():
      part = list(itertools.islice(records, size))
      if not part:
        return
      if number in wanted:
        yield number, self._encode(part, image_tokenizer)

  def _records(self) -> Iterator[tuple[str, Record]]:
    """Yields (where, record) for every line that is not blank."""
    for count, (where, line) in enumerate(file_lines(self.path)):
      try:
        text = line.decode("utf-8").strip()
      except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error}); save it as UTF-8.") from error
      yield where, read_record(text, where, f"{self.path.name}/{count}")

  @functools.cached_property
  def _images(self) -> ImageFolder:
    return ImageFolder(os.fspath(self.path.parent), BY_FLAG, self.allow_outside)

  def _check_image(self, image: str, where: str) -> bytes:
    """Reads an image and returns the SHA-256 of its file."""
    path = self._images.find(image, where)
    try:
      with reader.open_image(path, path) as file:
        content = file.read()
      reader.load_image(content, None)
    except FileNotFoundError as error:
      raise UserError(
        f"{where}: image '{image}' does not exist; give its path relative to {self.path.parent}."
      ) from error
    except UserError as error:
      raise UserError(f"{where}, image '{image}': {error}") from error
    return hashlib.sha256(content).digest()

  def _encode(self, records: list[Record], image_tokenizer: ImageTokenizer) -> list[Document]:
    """Converts records to documents, as `cm3leon encode_documents` does."""
    where = str(self.path)
    paths = [
      self._images.find(str(image), where) for record in records for image in images_of(record)
    ]
    codes = iter(())
    if paths:
      images = reader.load_images(paths, self.layout.resolution, self.num_threads, self.crop)
      codes = iter(self.layout.vocab.image_ids(image_tokenizer.encode(images)))
    documents = []
    for record in records:
      segments = tuple(
        Segment(True, next(codes)) if kind == "image" else Segment(False, self.layout.encode(value))
        for kind, value in segments_of(record)
      )
      group = getattr(record, "group", "")
      about = (record.source, record.license, record.attribution, group)
      concept = getattr(record, "concept", "") or group
      documents.append(Document(record.key, segments, *about, concept))
    return documents


@dataclasses.dataclass(frozen=True)
class StoredDocuments:
  """Documents of a store, written by the `encode_documents` stage with the id `made`."""

  store: DocumentStore
  layout: PromptLayout
  made: str

  def check(self) -> Checked:
    """Checks the length of every document, without reading tokens.

    Raises:
      UserError: a document takes more positions than the model was trained on, or the store is
        empty.
    """
    store, pairs = self.store, 0
    if not len(store):
      raise UserError(f"--documents names {store.folder}, which contains no documents.")
    for start in range(0, len(store), BLOCK):
      offsets = np.asarray(store.offsets[start : start + BLOCK + 1])
      segments = slice(offsets[0], offsets[-1])
      starts, sizes = offsets[:-1] - offsets[0], np.diff(offsets)
      needed = np.add.reduceat(np.asarray(store.lengths[segments], np.int64) + 1, starts)
      if len(too_long := np.flatnonzero(needed > self.layout.positions)):
        i = int(too_long[0])
        where = f"{store.folder}, document {start + i}, key '{store[start + i].key}'"
        _check_length(where, int(needed[i]), self.layout.positions)
      is_image = np.append(store.is_image[segments], False)
      pairs += int(((sizes == 2) & ~is_image[starts] & is_image[starts + 1]).sum())
    return Checked(len(store), pairs, hashlib.sha256(self.made.encode()).hexdigest())

  def parts(
    self, size: int, wanted: Collection[int], image_tokenizer: ImageTokenizer | None = None
  ) -> Iterator[tuple[int, list[Document]]]:
    """Yields (i, documents) for each wanted part i. Part i begins at document i * `size`."""
    for number in sorted(wanted):
      rows = range(number * size, min((number + 1) * size, len(self.store)))
      yield number, [self.store[i] for i in rows]


def open_documents(
  path: epath.PathLike, layout: PromptLayout, tokenizers: dict[str, str], **options: Any
) -> DocumentFile | StoredDocuments:
  """Opens the documents that `--documents` names.

  Args:
    path: a JSONL file, or the folder of a store in the folder `documents/` of a workdir.
    tokenizers: name -> id of the stage that trained the tokenizer of the run.
    **options: `crop`, `num_threads` and `allow_outside` of `DocumentFile`.

  Raises:
    UserError: the file or store does not exist, or the store was encoded with other tokenizers.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(
      f"--documents names {path}, which does not exist: give a JSONL file, or the folder of a "
      "document store."
    )
  if not path.is_dir():
    return DocumentFile(path, layout, **options)
  done = path.parent / stages.DONE
  if not (path / INDEX).exists() or not done.exists():
    raise UserError(
      f"--documents names the folder {path}, which no finished "
      "`cm3leon encode_documents` has written: give a JSONL file, or a folder such as "
      "workdir/documents/heldout_pairs."
    )
  made = read_json(done, {"config": dict, "id": str})
  for name, made_by in made["config"].get("inputs", {}).items():
    if tokenizers.get(name, made_by) != made_by:
      raise UserError(
        f"--documents names {path}, which was encoded with another {name} than --workdir has: "
        "encode its raw data in this workdir, or name the workdir that it belongs to."
      )
  return StoredDocuments(DocumentStore(path, layout.vocab), layout, made["id"])


def segments_of(record: Record) -> list[tuple[str, Any]]:
  """Returns the kind, "text" or "image", and the value of each segment of a record.

  >>> segments_of(RawPair("cat-1", "cat.jpg", "a cat"))
  [('text', 'a cat'), ('image', 'cat.jpg')]
  """
  if isinstance(record, RawInterleaved):
    return [item for segment in record.segments for item in segment.items()]
  if isinstance(record, RawPair):
    return [("text", record.caption), ("image", record.image)]
  return [("text", record.text)]


def read_record(line: str, where: str, key: str) -> Record:
  """Parses a line of a JSONL file. The fields of the line determine the type of the record.

    {"text": "Cats sleep."}                             RawText
    {"image": "cat.jpg", "caption": "a cat"}            RawPair
    {"segments": [{"text": "a"}, {"image": "b.png"}]}   RawInterleaved

  If the line has no field `key`, the record gets the key `key`. Messages call the line `where`.

  Raises:
    UserError: the line is not a JSON object, or a field is unknown, absent, empty or of a wrong
      type.
  """
  try:
    values = parse_json(line, where, [f"{', '.join(FORMS[:-1])}, or {FORMS[-1]}"])
    kinds = {"segments": RawInterleaved, "image": RawPair, "caption": RawPair, "text": RawText}
    cls = next((kinds[name] for name in kinds if name in values), None)
    if cls is None:
      raise UserError(f"{where} has no {', no '.join(FORMS)}: it must have one of these.")
    form = next(name for name in kinds if kinds[name] is cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
      if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"it may have {', '.join(known)}."
        raise UserError(f"{where}: field '{name}' is unknown next to '{form}': {hint}")
    return make_record(cls, {**values, "key": values.get("key") or key}, where)
  except RecordError as error:
    raise UserError(str(error)) from error


def _check_length(where: str, needed: int, positions: int) -> None:
  if needed > positions:
    raise UserError(
      f"{where}: the document takes {needed} positions; the model was trained on {positions}: "
      "shorten it, or split it."
    )
