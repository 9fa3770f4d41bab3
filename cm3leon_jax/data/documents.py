"""Documents: ordered text and image segments as token ids, kept in ArrayRecord. Schema: docs/data_formats.md."""

import dataclasses
import functools

from array_record.python import array_record_module
from etils import epath
import msgpack
import numpy as np

from cm3leon_jax import stages
from cm3leon_jax.config import UserError
from cm3leon_jax.vocab import VocabLayout

SCHEMA_VERSION = 1
RECORDS = "documents.array_record"
LENGTHS = "lengths.npz"
INDEX = "index.json"


@dataclasses.dataclass(frozen=True)
class Segment:
  """One text or one image. `tokens`: [T] int32 ids of the shared vocabulary, without `<break>` or `</s>`."""

  is_image: bool
  tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Document:
  """Segments in reading order (a caption-image pair: text first) and where they come from.

  Attributes:
    key: unique name within its source.
    segments: at least one.
    source, license, attribution: of the original work.
    group: near-duplicates share one; a document is never its own group's neighbour. Empty: no group.
  """

  key: str
  segments: tuple[Segment, ...]
  source: str
  license: str
  attribution: str
  group: str = ""


def encode_document(document: Document) -> bytes:
  segments = [{"image": s.is_image, "tokens": np.asarray(s.tokens, "<i4").tobytes()} for s in document.segments]
  fields = {k: getattr(document, k) for k in ("key", "source", "license", "attribution", "group")}
  return msgpack.packb({**fields, "segments": segments})


def decode_document(record: bytes) -> Document:
  fields = msgpack.unpackb(record)
  segments = tuple(Segment(s["image"], np.frombuffer(s["tokens"], "<i4")) for s in fields.pop("segments"))
  return Document(segments=segments, **fields)


def write_documents(folder: epath.PathLike, documents, vocab: VocabLayout) -> int:
  """Writes `documents` (an iterable of Document) as one store and returns their number.

  index.json is written last: a folder without it is no store.

  Raises:
    UserError: a document without segments or with an empty one, or with ids outside its modality's range.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / INDEX).unlink(missing_ok=True)
  writer = array_record_module.ArrayRecordWriter(str(folder / RECORDS), "group_size:1")
  lengths, is_image, counts, groups = [], [], [], []
  for document in documents:
    _check(document, vocab)
    writer.write(encode_document(document))
    counts.append(len(document.segments))
    lengths += [len(s.tokens) for s in document.segments]
    is_image += [s.is_image for s in document.segments]
    groups.append(document.group)
  writer.close()
  arrays = {
    "offsets": np.cumsum([0, *counts]).astype(np.int64),
    "lengths": np.array(lengths, np.int32),
    "is_image": np.array(is_image, bool),
    "groups": np.array(groups, dtype=str),
  }
  with (folder / LENGTHS).open("wb") as f:
    np.savez(f, **arrays)
  index = {"schema_version": SCHEMA_VERSION, "vocab": dataclasses.asdict(vocab), "documents": len(counts)}
  stages.write_json(folder / INDEX, index)
  return len(counts)


def _check(document: Document, vocab: VocabLayout) -> None:
  if not document.segments:
    raise UserError(f"document '{document.key}' has no segments; it needs at least one text or image.")
  for segment in document.segments:
    kind, low, high = (
      ("image", vocab.text_size, vocab.size) if segment.is_image else ("text", vocab.num_special, vocab.text_size)
    )
    if not len(segment.tokens):
      raise UserError(f"document '{document.key}' has an empty {kind} segment; leave the segment or the document out.")
    if segment.tokens.min() < low or segment.tokens.max() >= high:
      raise UserError(
        f"document '{document.key}' has {kind} ids in [{segment.tokens.min()}, {segment.tokens.max()}]; "
        f"they must lie in [{low}, {high})."
      )


class DocumentStore:
  """Random access to the documents of one folder; lengths and groups stay in memory, tokens on disk.

  `store[i]` is a Document, `store.segment_lengths(i)` its segments' lengths ([n] int32) and kinds ([n] bool). The same for all N
  documents with S segments: `lengths` [S] int32 and `is_image` [S] bool, those of document i at `offsets[i]` to `offsets[i + 1]`
  ([N + 1] int64).
  """

  def __init__(self, folder: epath.PathLike, vocab: VocabLayout):
    """Raises UserError: no store there, another schema version, or another vocabulary than `vocab`."""
    self.folder = epath.Path(folder)
    index = stages.read_json(self.folder / INDEX)
    if index["schema_version"] != SCHEMA_VERSION:
      raise UserError(f"{self.folder} has schema version {index['schema_version']}; this code reads version {SCHEMA_VERSION}.")
    if index["vocab"] != dataclasses.asdict(vocab):
      raise UserError(
        f"{self.folder} was written with vocabulary {index['vocab']}, the config has {dataclasses.asdict(vocab)}."
      )
    with (self.folder / LENGTHS).open("rb") as f:
      arrays = np.load(f)
      self.offsets, self.lengths, self.is_image = arrays["offsets"], arrays["lengths"], arrays["is_image"]
      self.groups = arrays["groups"]

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @functools.cached_property
  def _reader(self):
    return array_record_module.ArrayRecordReader(str(self.folder / RECORDS))

  def __getitem__(self, i: int) -> Document:
    if not 0 <= i < len(self):
      raise IndexError(f"document {i} of {len(self)} in {self.folder}")
    return decode_document(self._reader.read([int(i)])[0])

  def segment_lengths(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    part = slice(self.offsets[i], self.offsets[i + 1])
    return self.lengths[part], self.is_image[part]
