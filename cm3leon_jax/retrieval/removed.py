"""Keeps removed documents out of retrieval, without a change of the index or the embeddings."""

# n documents, C candidates of a document.

from collections.abc import Iterable, Sequence
import re

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.config.data import MOST_CROPS
from cm3leon_jax.data.documents.store import group_id
from cm3leon_jax.data.sources.records import crop_key
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.retrieval.arrays import ArrayStore

FILE = "removed.json"  # In neighbors/, beside the index.
SCAN = 2**22  # Number of keys that are read at a time.


def keys(folder: epath.PathLike) -> list[str]:
  """Returns the keys of the documents that were removed from the bank in `folder`."""
  path = epath.Path(folder) / FILE
  return [str(key) for key in read_json(path, {"keys": list})["keys"]] if path.exists() else []


def with_crops(documents: Iterable[str]) -> dict[str, str]:
  """Returns the keys of documents, their images and all random crops of these, to the document.

  with_crops(["a", "b crop 2"]) has the keys "a", "a crop 1", ..., "b", "b crop 1", ...
  """
  result: dict[str, str] = {}
  for key in documents:
    image = re.sub(rf"{re.escape(crop_key('', 0)[:-1])}\d+$", "", key)
    crops = (crop_key(image, i) for i in range(1, MOST_CROPS + 1))
    result |= dict.fromkeys((key, image, *crops), key)
  return result


def identity(folder: epath.PathLike) -> dict[str, str]:
  """Returns a digest of the removed documents, on which samples depend; {} if there are none."""
  path = epath.Path(folder) / FILE
  return {"removed": str(digest(path))} if path.exists() else {}


def rows(folder: epath.PathLike, documents: Sequence[str] = ()) -> np.ndarray:
  """Returns the rows of the removed documents, and of `documents`, in the bank.

  Copies of a document have the same key, and all crops of its image belong to it. Raises UserError
  if one of `documents` is not in the bank.
  """
  names = with_crops((*keys(folder), *documents))
  hashes = {group_id(name): key for name, key in names.items()}
  found, seen = [np.zeros(0, np.int64)], set()
  stored = ArrayStore(epath.Path(folder) / "train" / "keys") if hashes else ()
  for start in range(0, len(stored), SCAN):
    block = stored[start : start + SCAN]
    places = np.flatnonzero(np.isin(block, np.array([*hashes], np.uint64)))
    found.append(start + places)
    seen |= {hashes[int(value)] for value in block[places]}
  if missing := [key for key in documents if key not in seen]:
    raise UserError(
      f"document '{missing[0]}' is not in the bank of {folder}: give a key from results.jsonl or "
      "CM3Leon.retrieve."
    )
  return np.concatenate(found)


def remove(folder: epath.PathLike, documents: Sequence[str]) -> list[str]:
  """Removes documents and returns the keys of all removed ones. For errors, see `rows`."""
  rows(folder, documents)
  every = [*dict.fromkeys([*keys(folder), *documents])]
  write_json(epath.Path(folder) / FILE, {"keys": every})
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
