"""Documents: ordered text and image segments as token ids, in ArrayRecord shards.

The schema is in docs/data_formats.md.
"""

# N documents of a store, S segments of all of them, T tokens of a segment.

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import hashlib

from array_record.python import array_record_module
from etils import epath
import msgpack
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.io import partial_path, read_json, replacing, write_json
from cm3leon_jax.vocab import VocabLayout

SCHEMA_VERSION = 4
RECORDS, LENGTHS = ".array_record", ".npz"  # Suffixes of the files of a shard.
INDEX = "index.json"
FIELDS = {"schema_version": int, "vocab": dict, "shards": dict}  # Of the index.
MAX_OPEN = 256  # Shards that a store keeps open.
ENCODE_AGAIN = "delete the folder documents/ and run `python -m launch.encode_documents` again"


@dataclasses.dataclass(frozen=True)
class Segment:
  """A text or image: `tokens` [T] int32 of the shared vocabulary, without `<break>` and `</s>`."""

  is_image: bool
  tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Document:
  """Segments in reading order, in a pair the caption first, and their origin.

  Attributes:
    key: unique name within its source.
    segments: at least one.
    source, license, attribution: of the original work.
    group: shared by near duplicates, which are never neighbors of each other. Empty: no group.
    concept: shared by documents that show the same, which are not independent. Empty: no concept.
    facts: what image and caption show, a JSON object; empty for sources that do not know it.
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
  """Encodes a document as a record of a shard."""
  segments = [
    {"image": s.is_image, "tokens": np.asarray(s.tokens, "<i4").tobytes()}
    for s in document.segments
  ]
  names = ("key", "source", "license", "attribution", "group", "concept", "facts")
  fields = {name: getattr(document, name) for name in names}
  return msgpack.packb({**fields, "segments": segments})


def decode_document(record: bytes) -> Document:
  """Inverts `encode_document`."""
  fields = msgpack.unpackb(record)
  segments = tuple(
    Segment(s["image"], np.frombuffer(s["tokens"], "<i4")) for s in fields.pop("segments")
  )
  return Document(segments=segments, **fields)


def group_id(group: str) -> int:
  """Hashes the name of a group or concept to 64 bits, an empty name to 0."""
  return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") or 1 if group else 0


def write_shard(
  folder: epath.PathLike, name: str, documents: Iterable[Document], vocab: VocabLayout
) -> int:
  """Writes `documents` as one shard of the store in `folder`, atomically; returns their number.

  Raises:
    UserError: a document does not pass `check_document`.
  """
  folder = epath.Path(folder)
  lengths, is_image, counts, groups, concepts = [], [], [], [], []
  token_counts = np.zeros(vocab.size, np.int64)
  with partial_path(folder / f"{name}{RECORDS}") as partial:
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
    try:
      for document in documents:
        check_document(document, vocab)
        writer.write(encode_document(document))
        counts.append(len(document.segments))
        lengths += [len(s.tokens) for s in document.segments]
        is_image += [s.is_image for s in document.segments]
        groups.append(group_id(document.group))
        concepts.append(group_id(document.concept))
        add_tokens(token_counts, document)
    finally:
      writer.close()
  arrays = {
    "schema_version": SCHEMA_VERSION,
    "vocab": np.array(dataclasses.astuple(vocab)),
    "counts": np.array(counts, np.int32),
    "lengths": np.array(lengths, np.int32),
    "is_image": np.array(is_image, bool),
    "groups": np.array(groups, np.uint64),
    "concepts": np.array(concepts, np.uint64),
    "token_counts": token_counts,
  }
  with replacing(folder / f"{name}{LENGTHS}") as f:
    np.savez_compressed(f, **arrays)  # Most token counts of a small shard are 0.
  return len(counts)


def add_tokens(counts: np.ndarray, document: Document) -> None:
  """Adds the occurrences of every id in `document` to `counts`, [vocab.size] int64."""
  np.add.at(counts, np.concatenate([segment.tokens for segment in document.segments]), 1)


def finish_store(folder: epath.PathLike, names: Sequence[str], vocab: VocabLayout) -> int:
  """Joins the shards `names`, in their order, into one store; returns its number of documents.

  index.json is written last: a folder without it is not a store.

  Raises:
    UserError: a shard is absent, or has another schema version or vocabulary.
  """
  folder = epath.Path(folder)
  (folder / INDEX).unlink(missing_ok=True)
  shards, token_counts = [], np.zeros(vocab.size, np.int64)
  for name in names:
    shards.append(read_lengths(folder, name, vocab))
    token_counts += shards[-1].pop("token_counts")  # All shards would fill the memory.
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
  about = {"schema_version": SCHEMA_VERSION, "vocab": dataclasses.asdict(vocab)}
  total = sum(counts.values())
  write_json(folder / INDEX, {**about, "documents": total, "shards": counts})
  return total


def write_documents(
  folder: epath.PathLike, documents: Iterable[Document], vocab: VocabLayout
) -> int:
  """Writes `documents` as a store of one shard; returns and raises as `write_shard`."""
  (epath.Path(folder) / INDEX).unlink(missing_ok=True)
  write_shard(folder, "000000", documents, vocab)
  return finish_store(folder, ["000000"], vocab)


def read_lengths(folder: epath.Path, name: str, vocab: VocabLayout) -> dict[str, np.ndarray]:
  """Reads the arrays that `write_shard` writes beside the records.

  Raises:
    UserError: they are absent, or have another schema version or vocabulary.
  """
  path = folder / f"{name}{LENGTHS}"
  if not path.exists():
    raise UserError(f"{path} does not exist: run `python -m launch.encode_documents` again.")
  with path.open("rb") as f, np.load(f) as file:
    arrays = dict(file)
  _check_version(path, int(arrays["schema_version"]))
  _check_vocab(path, VocabLayout(*arrays["vocab"].tolist()), vocab)
  return arrays


def _check_version(path: epath.Path, version: int) -> None:
  if version != SCHEMA_VERSION:
    raise UserError(
      f"{path} has schema version {version}; this code reads version {SCHEMA_VERSION}: "
      f"{ENCODE_AGAIN}."
    )


def _check_vocab(path: epath.Path, stored: VocabLayout, expected: VocabLayout) -> None:
  if stored != expected:
    raise UserError(
      f"{path} was written with vocabulary {dataclasses.asdict(stored)}, "
      f"the config has {dataclasses.asdict(expected)}: {ENCODE_AGAIN}."
    )


def check_document(document: Document, vocab: VocabLayout) -> None:
  """Raises UserError if a document has no or empty segments, or ids of the other modality."""
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
        f"document '{document.key}' has an empty {kind} segment; remove the segment or document."
      )
    first, last = segment.tokens.min(), segment.tokens.max()
    if first < low or last >= high:
      raise UserError(
        f"document '{document.key}' has {kind} ids in [{first}, {last}]; "
        f"they must lie in [{low}, {high})."
      )


class DocumentStore:
  """Random access to the documents of one folder: `store[i]` reads document i from disk.

  Attributes, mapped into memory:
    offsets: [N + 1] int64; the segments of document i are `offsets[i]` to `offsets[i + 1]`.
    lengths: [S] int32, tokens of each segment.
    is_image: [S] bool.
    groups, concepts: [N] uint64, see `group_id`.
    token_counts: [vocab.size] int64, occurrences of each id.
  """

  def __init__(self, folder: epath.PathLike, vocab: VocabLayout):
    """Opens a store; raises UserError if it is absent or of another schema or vocabulary."""
    self.folder, self.vocab = epath.Path(folder), vocab
    index = read_json(self.folder / INDEX, FIELDS)
    _check_version(self.folder, index["schema_version"])
    _check_vocab(self.folder, VocabLayout(**index["vocab"]), vocab)
    self.shards: dict[str, int] = index["shards"]
    self._names, self._ends = list(self.shards), np.cumsum([*self.shards.values()], dtype=np.int64)
    self.offsets, self.lengths, self.is_image, self.groups, self.concepts, self.token_counts = (
      _map_array(self.folder / f"{field}.npy")
      for field in ("offsets", "lengths", "is_image", "groups", "concepts", "token_counts")
    )
    self._reader = functools.lru_cache(MAX_OPEN)(self._open)

  @property
  def parts(self) -> tuple["DocumentStore", ...]:
    """Returns the stores that hold the documents: this one; see `Bank`."""
    return (self,)

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def _open(self, name: str):
    return array_record_module.ArrayRecordReader(str(self.folder / f"{name}{RECORDS}"))

  def __getitem__(self, i: int) -> Document:
    if not 0 <= i < len(self):
      raise IndexError(f"document {i} of {len(self)} in {self.folder}")
    shard = int(np.searchsorted(self._ends, i, side="right"))
    first = int(self._ends[shard - 1]) if shard else 0
    return decode_document(self._reader(self._names[shard]).read([int(i) - first])[0])

  def segment_lengths(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `lengths` and `is_image` of the segments of document i."""
    segments = slice(self.offsets[i], self.offsets[i + 1])
    return self.lengths[segments], self.is_image[segments]


class Bank:
  """The documents that can be retrieved: training pairs, and after them those of the split `bank`.

  Attributes:
    folder: of the training pairs.
    parts: stores of the two splits; the second is absent or empty where no pair has split `bank`.
  """

  def __init__(self, documents: epath.PathLike, vocab: VocabLayout):
    """Opens the pairs in the folder of all stores; raises as `DocumentStore`."""
    documents = epath.Path(documents)
    self.folder = documents / "train_pairs"
    self.parts = (DocumentStore(self.folder, vocab),)
    if (documents / "bank_pairs" / INDEX).exists():
      self.parts += (DocumentStore(documents / "bank_pairs", vocab),)

  @property
  def token_counts(self) -> np.ndarray:
    """Returns those of the training pairs."""
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
    """Returns `DocumentStore.segment_lengths` of document i."""
    store, i = self._locate(i)
    return store.segment_lengths(i)


def _map_array(path: epath.Path) -> np.ndarray:
  """Maps a local NumPy file into memory, or reads one in a bucket."""
  if "://" not in str(path):
    return np.asarray(np.load(path, mmap_mode="r"))  # A plain view: indexing a memmap costs more.
  with path.open("rb") as f:
    return np.load(f)


def validate_shard(folder: epath.PathLike, name: str, vocab: VocabLayout) -> dict[str, int]:
  """Checks every document of a shard against the schema and the arrays beside the records.

  Returns:
    Number of documents, segments and tokens.

  Raises:
    UserError: names the shard, the record and the error.
  """
  folder = epath.Path(folder)
  arrays, path = read_lengths(folder, name, vocab), folder / f"{name}{RECORDS}"
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    count = reader.num_records()
  except (OSError, ValueError, IndexError, RuntimeError) as error:
    raise UserError(f"{path} cannot be read ({error}): encode it again.") from error
  if count != len(arrays["counts"]):
    raise UserError(
      f"{path} holds {count} documents, {name}{LENGTHS} beside it {len(arrays['counts'])}: "
      "encode it again."
    )
  at, token_counts = 0, np.zeros(vocab.size, np.int64)
  for i in range(count):
    try:
      document = decode_document(reader.read([i])[0])
      check_document(document, vocab)
    except Exception as error:  # A damaged record raises errors of many kinds.
      message = f"{path}, record {i} is damaged or wrong ({error}): encode it again."
      raise UserError(message) from error
    where = f"{path}, record {i} ('{document.key}')"
    segments = slice(at, at + int(arrays["counts"][i]))
    expected = zip(arrays["lengths"][segments].tolist(), arrays["is_image"][segments].tolist())
    if [(len(s.tokens), s.is_image) for s in document.segments] != list(expected):
      raise UserError(f"{where} has other lengths than {name}{LENGTHS} says: encode it again.")
    for field in ("group", "concept"):
      if group_id(getattr(document, field)) != int(arrays[f"{field}s"][i]):
        raise UserError(f"{where} has another {field} than {name}{LENGTHS} says: encode it again.")
    add_tokens(token_counts, document)
    at = segments.stop
  if not np.array_equal(token_counts, arrays["token_counts"]):
    raise UserError(f"{path} has other token counts than {name}{LENGTHS} says: encode it again.")
  return {"documents": count, "segments": at, "tokens": int(token_counts.sum())}


def validate_store(store: DocumentStore) -> dict[str, int]:
  """Validates every shard of a store, and its token counts against the sum of the shards' counts.

  Returns:
    Number of shards, documents, segments and tokens.

  Raises:
    UserError: names the shard or file and the error.
  """
  total = {"shards": len(store.shards), "documents": 0, "segments": 0, "tokens": 0}
  token_counts = np.zeros(store.vocab.size, np.int64)
  for name in store.shards:
    for field, count in validate_shard(store.folder, name, store.vocab).items():
      total[field] += count
    token_counts += read_lengths(store.folder, name, store.vocab)["token_counts"]
  if not np.array_equal(token_counts, store.token_counts):
    raise UserError(
      f"{store.folder / 'token_counts.npy'} is not the sum of the token counts of the shards: "
      f"{ENCODE_AGAIN}."
    )
  return total
