"""Reads the documents to score, from a JSONL file or from the folder of a document store."""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import itertools
import json
import os
from typing import Any, TypeAlias

from etils import epath
import numpy as np

from cm3leon_jax.data.documents.encode import documents_of, texts_of
from cm3leon_jax.data.documents.store import Document, DocumentStore
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.image_folder import BY_FLAG, ImageFolder
from cm3leon_jax.data.sources.lines import json_lines
from cm3leon_jax.data.sources.records import (
  RawInterleaved,
  RawPair,
  RawText,
  Record,
  RecordError,
  Rejected,
  images_of,
  make_record,
)
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import open_filesystem
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.stages import stages
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

BLOCK = 256  # Number of documents whose images are in memory at a time.
KINDS = {"segments": RawInterleaved, "image": RawPair, "caption": RawPair, "text": RawText}
Documents: TypeAlias = Sequence[Document] | DocumentStore


def open_documents(
  path: epath.PathLike,
  layout: PromptLayout,
  tokenizers: dict[str, str],
  image_tokenizer: ImageTokenizer,
  **options: Any,
) -> tuple[Documents, str]:
  """Opens the documents that `--documents` names. Returns them, and a digest of their content.

  Args:
    path: a JSONL file, or the folder of a store in the folder `documents/` of a workdir.
    tokenizers: name -> id of the stage that trained the tokenizer of the run.
    **options: `crop`, `num_threads` and `allow_outside` of `read_documents`.

  Raises:
    UserError: there are no documents, a line of the file is wrong, or the store was encoded with
      other tokenizers.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f"--documents names {path}, which does not exist.")
  documents: Documents
  if path.is_dir():
    made = read_json(path.parent / stages.DONE, {"config": dict, "id": str})
    for name, made_by in made["config"].get("inputs", {}).items():
      if tokenizers.get(name, made_by) != made_by:
        raise UserError(
          f"--documents names {path}, which was encoded with another {name} than --workdir has: "
          "encode its raw data in this workdir, or name the workdir that it belongs to."
        )
    documents, content = DocumentStore(path, layout.vocab), made["id"].encode()
  else:
    documents = list(read_documents(path, layout, image_tokenizer, **options))
    content = json.dumps([_plain(document) for document in documents]).encode()
  if not len(documents):
    raise UserError(f"--documents names {path}, which contains no documents.")
  return documents, hashlib.sha256(content).hexdigest()


def _plain(document: Document) -> list:
  return [
    document.key,
    document.concept,
    [segment.tokens.tolist() for segment in document.segments],
  ]


def read_documents(
  path: epath.PathLike,
  layout: PromptLayout,
  image_tokenizer: ImageTokenizer,
  crop: str = "center",
  num_threads: int = 8,
  allow_outside: bool = False,
) -> Iterator[Document]:
  """Reads a JSONL file, and yields its documents as `cm3leon encode_documents` makes them.

    {"text": "Cats sleep."}                             RawText
    {"image": "cat.jpg", "caption": "a cat"}            RawPair
    {"segments": [{"text": "a"}, {"image": "b.png"}]}   RawInterleaved

  Args:
    path: path of the file. Paths of images are relative to its folder.
    crop: how images become square, see `RawConfig.crop`.
    allow_outside: whether images may be outside of the folder of the file.

  Raises:
    UserError: a line is wrong, or an image cannot be read or is not in the folder of the file.
  """
  path = epath.Path(path)
  folder = ImageFolder(os.fspath(path.parent), BY_FLAG, allow_outside)
  records: list[Record] = []
  paths: list[list[str]] = []
  for where, values in json_lines(*open_filesystem(path), []):
    record = _record(values, where, f"{path.name}/{len(records)}")
    records.append(record)
    paths.append([folder.find(str(image), where) for image in images_of(record)])
  for start in range(0, len(records), BLOCK):
    some = records[start : start + BLOCK]
    files = list(itertools.chain.from_iterable(paths[start : start + BLOCK]))
    texts = iter([layout.encode(text) for record in some for text in texts_of(record)])
    codes: Iterator[np.ndarray] = iter(())
    if files:
      images = reader.load_images(files, layout.resolution, num_threads, crop)
      codes = iter(image_tokenizer.encode(images))
    counts = np.zeros(layout.vocab.image_size, np.int64)
    yield from documents_of(some, texts, codes, layout.vocab, counts)


def _record(values: dict | Rejected, where: str, key: str) -> Record:
  """Makes a record from a line, whose fields determine its type. `key` is the default key."""
  if isinstance(values, Rejected):
    raise UserError(values.message)
  cls = next((KINDS[name] for name in KINDS if name in values), None)
  if cls is None:
    raise UserError(f"{where} must have a text, an image with its caption, or segments.")
  if unknown := set(values) - {field.name for field in dataclasses.fields(cls)}:
    raise UserError(f"{where}: field '{min(unknown)}' is unknown.")
  try:
    return make_record(cls, {**values, "key": values.get("key") or key}, where)
  except RecordError as error:
    raise UserError(str(error)) from error
