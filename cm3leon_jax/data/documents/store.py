"""Stores documents in ArrayRecord shards. A document is a list of text and image segments.

Segments are token ids. docs/workdir.md describes the file format.
"""

# N documents of a store, S segments of all documents, T tokens of a segment.

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import hashlib
from typing import Any

from array_record.python import array_record_module
from etils import epath
import msgpack
import numpy as np

from cm3leon_jax.data.documents.shard_files import (
  LENGTHS,
  RECORDS,
  SCHEMA_VERSION,
  BadRecord,
  check_shard_file,
  check_version,
  check_vocab,
  describe_shard,
  read_lengths,
)
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.digests import describe
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.files.rewritten import rewriting
from cm3leon_jax.stages import stages
from cm3leon_jax.vocab import VocabLayout

INDEX = "index.json"
FIELDS = {"schema_version": int, "vocab": dict, "shards": dict, "documents": int}  # Of `INDEX`.
MAX_OPEN = 256  # Maximum number of shards that a store keeps open.
ARRAYS = ("offsets", "lengths", "is_image", "groups", "concepts", "token_counts")


@dataclasses.dataclass(frozen=True)
class Segment:
  """A text or image as ids of the shared vocabulary, [T] int32, without `<break>` and `</s>`."""

  is_image: bool
  tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Document:
  """Segments in reading order, with their origin. In a pair, the caption is the first segment.

  Attributes:
    key: unique name within its source.
    segments: at least one segment.
    source, license, attribution: origin of the original work.
    group: name that near duplicates share. Documents of a group are never neighbors of each other.
      "" means no group.
    concept: name that documents with the same content share. Such documents are not independent.
      "" means no concept.
    facts: JSON object with facts about the image and caption. Empty for sources without facts.
  """

  key: str
  segments: tuple[Segment, ...]
  source: str
  license: str
  attribution: str
  group: str = ""
  concept: str = ""
  facts: dict = dataclasses.field(default_factory=dict)


def encode_document(document: Document) -> bytes:
  """Converts a document to the bytes of a record."""
  segments = [
    {"image": s.is_image, "tokens": np.asarray(s.tokens, "<i4").tobytes()}
    for s in document.segments
  ]
  fields = {name: value for name, value in vars(document).items() if name != "segments"}
  return msgpack.packb({**fields, "segments": segments})


def decode_document(record: bytes) -> Document:
  """Converts the bytes of `encode_document` back to a document."""
  fields = msgpack.unpackb(record)
  segments = tuple(
    Segment(s["image"], np.frombuffer(s["tokens"], "<i4")) for s in fields.pop("segments")
  )
  return Document(segments=segments, **fields)


def group_id(group: str) -> int:
  """Hashes the name of a group or concept to 64 bits. An empty name becomes 0."""
  return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") or 1 if group else 0


def write_shard(
  folder: epath.PathLike,
  name: str,
  documents: Iterable[Document],
  vocab: VocabLayout,
  options: str = "group_size:1",
) -> int:
  """Writes a shard of the store in `folder` atomically. Returns the number of documents.

  `options` are for ArrayRecord, which compresses each group of records as one block.

  Raises UserError if a document is invalid, see `check_document`.
  """
  folder = epath.Path(folder)
  lengths, is_image, counts, groups, concepts = [], [], [], [], []
  token_counts = np.zeros(vocab.size, np.int64)
  with rewriting(folder / f"{name}{RECORDS}") as partial:
    writer = array_record_module.ArrayRecordWriter(str(partial), options)
    try:
      for document in documents:
        check_document(document, vocab)
        writer.write(encode_document(document))
        counts.append(len(document.segments))
        lengths += [len(s.tokens) for s in document.segments]
        is_image += [s.is_image for s in document.segments]
        groups.append(group_id(document.group))
        concepts.append(group_id(document.concept))
        np.add.at(token_counts, np.concatenate([s.tokens for s in document.segments]), 1)
    finally:
      writer.close()
    records = describe(partial)
  arrays: dict[str, Any] = {
    "schema_version": SCHEMA_VERSION,
    "vocab": np.array([*vocab.sizes.values()]),
    "counts": np.array(counts, np.int32),
    "lengths": np.array(lengths, np.int32),
    "is_image": np.array(is_image, bool),
    "groups": np.array(groups, np.uint64),
    "concepts": np.array(concepts, np.uint64),
    "token_counts": token_counts,
    "records": np.array([str(records["bytes"]), records["sha256"]]),
  }
  with rewriting(folder / f"{name}{LENGTHS}") as partial, partial.open("wb") as f:
    np.savez_compressed(f, **arrays)  # Compressed, because most token counts are 0.
  return len(counts)


def finish_store(folder: epath.PathLike, names: Sequence[str], vocab: VocabLayout) -> int:
  """Joins the shards `names`, in this order, into one store. Returns the number of documents.

  Writes index.json last, so a folder without index.json is not a complete store.

  Raises:
    UserError: a shard is missing, is damaged, or has another schema version or vocabulary.
  """
  folder = epath.Path(folder)
  (folder / INDEX).unlink(missing_ok=True)
  shards: list[dict[str, Any]] = []
  files: dict[str, dict] = {}
  token_counts = np.zeros(vocab.size, np.int64)
  for name in names:
    shards.append(read_lengths(folder, name, vocab))
    files |= describe_shard(folder, name, shards[-1].pop("records"))
    token_counts += shards[-1].pop("token_counts")  # Too large to keep for all shards.
  joined = {
    field: np.concatenate([shard[field] for shard in shards])
    for field in ("counts", "lengths", "is_image", "groups", "concepts")
  }
  joined["offsets"] = np.cumsum([0, *joined.pop("counts")], dtype=np.int64)
  joined["token_counts"] = token_counts
  for field, array in joined.items():
    with replacing(folder / f"{field}.npy") as f:
      np.save(f, array)
  counts = {name: len(shard["counts"]) for name, shard in zip(names, shards)}
  about = {"schema_version": SCHEMA_VERSION, "vocab": vocab.sizes}
  total = sum(counts.values())
  write_json(folder / INDEX, {**about, "documents": total, "shards": counts, "files": files})
  return total


def write_documents(
  folder: epath.PathLike, documents: Iterable[Document], vocab: VocabLayout, *options: str
) -> int:
  """Writes a store with one shard. Has the result and the errors of `write_shard`."""
  (epath.Path(folder) / INDEX).unlink(missing_ok=True)
  write_shard(folder, "000000", documents, vocab, *options)
  return finish_store(folder, ["000000"], vocab)


def check_document(document: Document, vocab: VocabLayout) -> None:
  """Raises UserError if a document has no segments, empty segments, or ids of the wrong kind."""
  if not document.segments:
    raise UserError(
      f"document '{document.key}' has no segments; it needs at least one text or image."
    )
  for segment in document.segments:
    kind, low, high = "text", vocab.num_special, vocab.text_size
    if segment.is_image:
      kind, low, high = "image", vocab.text_size, vocab.size
    if not len(segment.tokens):
      raise UserError(
        f"document '{document.key}' has an empty {kind} segment; remove segment or document."
      )
    first, last = segment.tokens.min(), segment.tokens.max()
    if first < low or last >= high:
      raise UserError(
        f"document '{document.key}' has {kind} ids in [{first}, {last}]; "
        f"they must lie in [{low}, {high})."
      )


class DocumentStore:
  """Random access to the documents of one folder: `store[i]` reads document i from disk.

  The store compares each array with its digest when it opens the array. It verifies the checksum
  and the segment lengths of each record that it reads. It compares only the size of a record file;
  `validate.validate_stores` compares the digest.

  Attributes (arrays are mapped into memory):
    offsets: [N + 1] int64. The segments of document i are `offsets[i]` to `offsets[i + 1]`.
    lengths: [S] int32, number of tokens of each segment.
    is_image: [S] bool.
    groups, concepts: [N] uint64, see `group_id`.
    token_counts: [vocab.size] int64, number of occurrences of each id.
  """

  def __init__(self, folder: epath.PathLike, vocab: VocabLayout):
    """Opens a store.

    Raises:
      UserError: the store is missing, is damaged, or has another schema version or vocabulary.
    """
    self.folder, self.vocab = epath.Path(folder), vocab
    stages.check_files(self.folder / INDEX)
    index = read_json(self.folder / INDEX, FIELDS)
    check_version(self.folder, index["schema_version"])
    check_vocab(self.folder, index["vocab"], vocab)
    self.shards: dict[str, int] = index["shards"]
    if wrong := [x for x, n in self.shards.items() if "/" in x or type(n) is not int or n < 0]:
      raise UserError(
        f"{self.folder / INDEX} has a wrong name or number of documents of the shard "
        f"{short(wrong[0])}: {stages.again(self.folder.parent, self.folder / INDEX)}."
      )
    self.files: dict[str, dict] = index.get("files", {})
    self._names, self._ends = list(self.shards), np.cumsum([*self.shards.values()], dtype=np.int64)
    self.offsets, self.lengths, self.is_image = map(self._map, ARRAYS[:3])
    kinds = [f"{x.ndim}{x.dtype.kind}" for x in (self.offsets, self.lengths, self.is_image)]
    if kinds != ["1i", "1i", "1b"]:
      again = stages.again(self.folder.parent, self.folder)
      raise UserError(f"{self.folder} has arrays of a wrong type: {again}.")
    end, documents = int(self.offsets[-1]), sum(self.shards.values())
    if not len(self) == documents == index["documents"] or not (
      len(self.lengths) == len(self.is_image) == end
    ):
      raise UserError(
        f"{self.folder} has {index['documents']} documents in {INDEX}, but offsets of {len(self)} "
        f"documents with {end} segments, and {len(self.lengths)} lengths: "
        f"{stages.again(self.folder.parent, self.folder / INDEX)}."
      )
    self._reader = functools.lru_cache(MAX_OPEN)(self._open)

  @functools.cached_property
  def groups(self) -> np.ndarray:
    return self._map("groups")

  @functools.cached_property
  def concepts(self) -> np.ndarray:
    return self._map("concepts")

  @functools.cached_property
  def token_counts(self) -> np.ndarray:
    return self._map("token_counts")

  def _map(self, field: str) -> np.ndarray:
    """Maps a local array into memory. Reads an array in a GCS bucket completely."""
    path = self.folder / f"{field}.npy"
    stages.check_files(path)
    try:
      if "://" not in str(path):
        return np.asarray(np.load(path, mmap_mode="r"))  # Faster to index than np.memmap.
      with path.open("rb") as f:
        return np.load(f)
    except (ValueError, OSError, EOFError) as error:
      raise UserError(
        f"{path} cannot be read ({error}): {stages.again(self.folder.parent, path)}."
      ) from error

  @property
  def parts(self) -> tuple["DocumentStore", ...]:
    """Returns (self,), so that a store and a `Bank` have the same interface."""
    return (self,)

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def _open(self, name: str) -> array_record_module.ArrayRecordReader:
    file = f"{name}{RECORDS}"
    if file in self.files:
      check_shard_file(self.folder, file, self.files[file], content=False)
    return array_record_module.ArrayRecordReader(str(self.folder / file))

  def check_shard(self, name: str) -> None:
    """Raises UserError if the digest of a file of the shard is wrong."""
    for file in (f"{name}{RECORDS}", f"{name}{LENGTHS}"):
      if file in self.files:
        check_shard_file(self.folder, file, self.files[file])

  def __getitem__(self, i: int) -> Document:
    """Reads document i. Raises BadRecord if its record is unreadable or its lengths are wrong."""
    if not 0 <= i < len(self):
      raise IndexError(f"document {i} of {len(self)} in {self.folder}")
    shard = int(np.searchsorted(self._ends, i, side="right"))
    name, record = self._names[shard], int(i) - (int(self._ends[shard - 1]) if shard else 0)
    try:
      document = decode_document(self._reader(name).read([record])[0])
      check_document(document, self.vocab)
      result = [len(segment.tokens) for segment in document.segments]
      expected = self.segment_lengths(i)[0].tolist()
      if result != expected:
        raise ValueError(f"its segments have {result} tokens, but lengths.npy says {expected}")
    except BadRecord:
      raise
    except Exception as error:  # Damaged records raise many kinds of errors.
      path = self.folder / f"{name}{RECORDS}"
      raise BadRecord(
        f"{path}, record {record} (document {i} of the store) cannot be read ({error}): "
        f"{stages.again(self.folder.parent, path)}."
      ) from error
    return document

  def segment_lengths(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `lengths` and `is_image` of the segments of document i."""
    segments = slice(self.offsets[i], self.offsets[i + 1])
    return self.lengths[segments], self.is_image[segments]


class Bank:
  """The documents that can be retrieved: training pairs, followed by pairs of the split `bank`.

  Attributes:
    parts: the store of the training pairs, and, if it exists, the store of the split `bank`.
  """

  def __init__(self, documents: epath.PathLike, vocab: VocabLayout):
    """Opens the stores of pairs in the folder `documents`. Raises the errors of `DocumentStore`."""
    documents = epath.Path(documents)
    self.folder = documents / "train_pairs"
    self.parts: tuple[DocumentStore, ...] = (DocumentStore(self.folder, vocab),)
    if (documents / "bank_pairs" / INDEX).exists():
      self.parts += (DocumentStore(documents / "bank_pairs", vocab),)

  @property
  def token_counts(self) -> np.ndarray:
    """Returns the token counts of the training pairs."""
    return self.parts[0].token_counts

  def __len__(self) -> int:
    return sum(map(len, self.parts))

  def _locate(self, i: int) -> tuple[DocumentStore, int]:
    if not 0 <= i < len(self):
      raise IndexError(f"document {i} of {len(self)} in the bank of {self.folder}")
    first = self.parts[0]
    return (first, i) if i < len(first) else (self.parts[1], i - len(first))

  def __getitem__(self, i: int) -> Document:
    store, i = self._locate(i)
    return store[i]

  def segment_lengths(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `lengths` and `is_image` of the segments of document i."""
    store, i = self._locate(i)
    return store.segment_lengths(i)


def first_documents(
  store: Bank | DocumentStore, ids: np.ndarray, count: int
) -> tuple[Document, ...]:
  """Returns the documents of the first `count` ids. Skips -1, which is padding."""
  return tuple(store[int(i)] for i in ids[ids >= 0][:count])
