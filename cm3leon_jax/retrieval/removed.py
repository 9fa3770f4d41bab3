"""Keeps removed documents out of retrieval, without a change of the index or the embeddings."""

# n documents, C candidates of a document.

from collections.abc import Callable, Sequence
import re

from etils import epath
import numpy as np

from cm3leon_jax.config.data import MOST_CROPS
from cm3leon_jax.data.documents.store import group_id
from cm3leon_jax.data.sources.records import crop_key
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files import locks
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.retrieval.arrays import ArrayStore

FILE = "removed.json"  # In neighbors/, beside the index.
SCAN = 2**22  # Number of keys that are read at a time.
# The entry of an erased document, whose key is hashed like the keys of the bank.
HASHED = re.compile(r"sha256:([0-9a-f]{16})")


def keys(folder: epath.PathLike) -> list[str]:
  """Returns the keys of the documents that were removed from the bank in `folder`."""
  path = epath.Path(folder) / FILE
  return [str(key) for key in read_json(path, {"keys": list})["keys"]] if path.exists() else []


def image_of(key: str) -> str:
  """Returns the key of the image of a document: "a" for "a" and for its random crop "a crop 2"."""
  return re.sub(rf"{re.escape(crop_key('', 0)[:-1])}\d+$", "", key)


def identity(folder: epath.PathLike) -> dict[str, str]:
  """Returns a digest of the removed documents, on which samples depend; {} if there are none."""
  path = epath.Path(folder) / FILE
  return {"removed": str(digest(path))} if path.exists() else {}


def rows(folder: epath.PathLike, documents: Sequence[str] = (), alone: bool = False) -> np.ndarray:
  """Returns the rows of the removed documents, unless `alone`, and of `documents`, in the bank.

  Copies of a document have the same key, and all crops of its image belong to it. Raises UserError
  if one of `documents` is not in the bank, or the bank has fewer documents than were removed.
  """
  every = dict.fromkeys((*([] if alone else keys(folder)), *documents))
  if not every:
    return np.zeros(0, np.int64)
  stored = ArrayStore(epath.Path(folder) / "train" / "keys")
  if len(every) > len(stored) + len(documents):
    raise UserError(
      f"{epath.Path(folder) / FILE} has {len(every)} keys, but the bank only {len(stored)} "
      "documents: delete the keys that are not in the bank."
    )
  hashes = {_hash(name): image_of(key) for key in every for name in (key, image_of(key))}
  found, seen, numbers = [], set(), range(1)
  while hashes:
    wanted, hit = np.fromiter(hashes, np.uint64), set()
    for start in range(0, len(stored), SCAN):
      block = stored[start : start + SCAN]
      places = np.flatnonzero(np.isin(block, wanted))
      found.append(start + places)
      hit |= {hashes[int(value)] for value in block[places]}
    seen |= hit
    # Crops are numbered without gaps: 1, then 2 and 3, then 4 to 7, ... while some are found.
    numbers = range(numbers.stop, min(2 * numbers.stop, MOST_CROPS + 1))
    hashes = {_hash(crop_key(image, i)): image for image in hit for i in numbers}
  if missing := [key for key in documents if image_of(key) not in seen]:
    raise UserError(
      f"document '{missing[0]}' is not in the bank of {folder}: give a key from results.jsonl or "
      "CM3Leon.retrieve."
    )
  return np.unique(np.concatenate(found))


def _hash(key: str) -> int:
  if hashed := HASHED.fullmatch(key):
    return int(hashed[1], 16)
  try:
    return group_id(key)
  except UnicodeEncodeError as error:
    raise UserError(f"the key {short(key)} of a removed document is not valid Unicode.") from error


def remove(
  folder: epath.PathLike,
  documents: Sequence[str],
  erase: Callable[[np.ndarray], None] | None = None,
) -> list[str]:
  """Removes documents and returns the keys of all removed ones. For errors, see `rows`.

  `erase` is then called with the rows of `documents`. The file has only hashes of their keys.
  """
  with locks.alone(folder):
    rows(folder, documents)
    every = [*keys(folder), *documents]
    if erase is not None:
      gone, images = rows(folder, documents, alone=True), {*map(image_of, documents)}
      every = [key for key in every if image_of(key) not in images]
      hashes = ArrayStore(epath.Path(folder) / "train" / "keys")[gone]
      every += [f"sha256:{value:016x}" for value in hashes]
    every = [*dict.fromkeys(every)]
    write_json(epath.Path(folder) / FILE, {"keys": every})
    if erase is not None:
      erase(gone)
  return every


def dropped(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Drops the candidates in `rows` from ids [n, C], and appends -1 instead.

  ids = [[4 7 9 -1]], rows = [7]: [[4 9 -1 -1]]
  """
  if not len(rows):
    return ids
  gone, ids = np.isin(ids, rows), ids.copy()
  ids[gone] = -1
  hit = gone.any(axis=1)
  order = np.argsort(gone[hit], axis=1, kind="stable")
  ids[hit] = np.take_along_axis(ids[hit], order, axis=1)
  return ids
