"""Validates raw folders and document stores by reading every file.

Compares raw images with their digests. Compares documents with the schema, and with the arrays of
their shard and of their store.
"""

from concurrent import futures

from array_record.python import array_record_module
from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.shard_files import LENGTHS, RECORDS, encode_again, read_lengths
from cm3leon_jax.data.documents.store import (
  DocumentStore,
  add_tokens,
  check_document,
  decode_document,
  group_id,
)
from cm3leon_jax.data.raw import reader as raw_pairs
from cm3leon_jax.data.sources.records import KINDS, SPLITS
from cm3leon_jax.files.digests import digest
from cm3leon_jax.vocab import VocabLayout

# Names of the arrays with one entry per segment, and of the arrays with one entry per document.
SEGMENTS, DOCUMENTS = ("lengths", "is_image"), ("groups", "concepts")


def validate_shard(folder: epath.PathLike, name: str, vocab: VocabLayout) -> dict[str, int]:
  """Checks every document of a shard against the schema and the arrays of the shard.

  Returns the numbers of documents, segments and tokens.

  Raises:
    UserError: the shard is invalid. The message names the shard, the record and the error.
  """
  folder = epath.Path(folder)
  arrays, path = read_lengths(folder, name, vocab), folder / f"{name}{RECORDS}"
  remedy = encode_again(path)
  if not path.exists():
    raise UserError(f"{path} is missing: {remedy}.")
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    count = reader.num_records()
  except (OSError, ValueError, IndexError, RuntimeError) as error:
    raise UserError(f"{path} cannot be read ({error}): {remedy}.") from error
  if count != len(arrays["counts"]):
    raise UserError(
      f"{path} has {count} documents, but {name}{LENGTHS} describes {len(arrays['counts'])}: "
      f"{remedy}."
    )
  at, token_counts = 0, np.zeros(vocab.size, np.int64)
  for i in range(count):
    try:
      document = decode_document(reader.read([i])[0])
      check_document(document, vocab)
    except Exception as error:  # Damaged records raise many kinds of errors.
      raise UserError(f"{path}, record {i} is damaged or invalid ({error}): {remedy}.") from error
    where = f"{path}, record {i} ('{document.key}')"
    segments = slice(at, at + int(arrays["counts"][i]))
    expected = zip(arrays["lengths"][segments].tolist(), arrays["is_image"][segments].tolist())
    if [(len(s.tokens), s.is_image) for s in document.segments] != list(expected):
      raise UserError(f"{where} has segment lengths that differ from {name}{LENGTHS}: {remedy}.")
    for field in ("group", "concept"):
      if group_id(getattr(document, field)) != int(arrays[f"{field}s"][i]):
        raise UserError(f"{where} has a {field} that differs from {name}{LENGTHS}: {remedy}.")
    add_tokens(token_counts, document)
    at = segments.stop
  if not np.array_equal(token_counts, arrays["token_counts"]):
    raise UserError(f"{path} has token counts that differ from {name}{LENGTHS}: {remedy}.")
  return {"documents": count, "segments": at, "tokens": int(token_counts.sum())}


def validate_store(store: DocumentStore) -> dict[str, int]:
  """Validates every shard of a store. Compares the joined arrays with the arrays of the shards.

  Returns the numbers of shards, documents, segments and tokens.

  Raises:
    UserError: the store is invalid. The message names the file, the record or document, and the
      error.
  """
  total = {"shards": len(store.shards), "documents": 0, "segments": 0, "tokens": 0}
  token_counts = np.zeros(store.vocab.size, np.int64)
  for name in store.shards:
    store.check_shard(name)
    _check_joined(store, name, total)
    for field, count in validate_shard(store.folder, name, store.vocab).items():
      total[field] += count
    token_counts += read_lengths(store.folder, name, store.vocab)["token_counts"]
  if not np.array_equal(token_counts, store.token_counts):
    raise UserError(
      f"{store.folder / 'token_counts.npy'} is not the sum of the token counts of the shards: "
      f"{encode_again(store.folder / name)}."
    )
  return total


def validate_documents(folder: epath.PathLike, vocab: VocabLayout) -> None:
  """Applies `validate_store` to all stores of the stage `documents` and prints their counts."""
  names = [f"{split}_{kind}" for split in SPLITS for kind in KINDS]
  for path in [epath.Path(folder) / name for name in names]:
    if not path.exists():
      continue  # For example, a run may have no split `bank` or no interleaved documents.
    store = DocumentStore(path, vocab)
    counts = ", ".join(f"{count:,} {field}" for field, count in validate_store(store).items())
    print(f"{store.folder}: {counts}; all valid.", flush=True)


def validate_raw(folder: epath.PathLike, num_threads: int) -> None:
  """Compares all files of a raw folder with their digests and prints the number of images.

  Raises:
    UserError: a file is missing, or it changed after it was written. The message names the file.
  """
  folder = epath.Path(folder)
  names, images, earlier = list(raw_pairs.shards(folder)), 0, 0
  for name in names:
    described = raw_pairs.described_files(folder, name)
    for file, expected in described.items():
      raw_pairs.check_file(folder / name, file, expected)
    if raw_pairs.IMAGE_DIGESTS in described:
      images += _validate_images(folder / name, num_threads)
    else:
      earlier += 1
  state = f"{len(names):,} shards, {images:,} images; all match their digests"
  if earlier:
    state += f", but {earlier:,} of the shards, from an earlier version, have no image digests"
  print(f"{folder}: {state}.", flush=True)


def _validate_images(shard: epath.Path, num_threads: int) -> int:
  """Compares the images of a raw shard with their digests. Returns the number of images."""
  lines = (shard / raw_pairs.IMAGE_DIGESTS).read_text(encoding="utf-8").splitlines()
  expected = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
  with futures.ThreadPoolExecutor(num_threads) as pool:
    for name, found in zip(expected, pool.map(lambda name: digest(shard / name), expected)):
      if found != expected[name]:
        wrong = "changed after it was written" if found else "is missing"
        raise UserError(f"{shard / name} {wrong}: {raw_pairs.again(shard)}.")
  return len(expected)


def _check_joined(store: DocumentStore, name: str, before: dict[str, int]) -> None:
  """Compares the joined arrays of a store with the arrays of shard `name`.

  `before` contains the numbers of documents and segments in all earlier shards. Raises UserError
  with the name of the file and the first document that differs.
  """
  arrays = read_lengths(store.folder, name, store.vocab)
  first, start = before["documents"], before["segments"]
  counts = arrays["counts"]
  ends = start + np.cumsum([0, *counts], dtype=np.int64)
  joined = {"offsets": ends, **{field: arrays[field] for field in (*SEGMENTS, *DOCUMENTS)}}
  for field, expected in joined.items():
    at = start if field in SEGMENTS else first
    found = getattr(store, field)[at : at + len(expected)]
    if np.array_equal(found, expected):
      continue
    places = np.flatnonzero(found != expected) if len(found) == len(expected) else [len(found)]
    place = int(places[0])
    if field in SEGMENTS:
      place = int(np.searchsorted(ends - start, place, side="right")) - 1
    raise UserError(
      f"{store.folder / f'{field}.npy'} differs from {name}{LENGTHS} from document {first + place} "
      f"(record {place} of {name}): {encode_again(store.folder / name)}."
    )
