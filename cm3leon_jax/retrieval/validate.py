"""Checks that the files of `cm3leon build_neighbors` match each other and the documents."""

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Bank, DocumentStore
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.bank import ARRAYS
from cm3leon_jax.retrieval.neighbors import check_ids
from cm3leon_jax.runs import stages
from cm3leon_jax.vocab import VocabLayout

BLOCK = 2**16  # Number of rows that are read at a time.


def validate_neighbors(workdir: epath.PathLike, vocab: VocabLayout) -> dict[str, int]:
  """Reads all arrays of a finished stage, and checks that all ids are in the bank.

  Returns the number of documents in the bank, the number of arrays, and the number of neighbors.

  Raises:
    UserError: a file is absent, damaged or wrong. The message names the file and, if possible, the
      row.
  """
  folder, documents = epath.Path(workdir) / "neighbors", epath.Path(workdir) / "documents"
  stages.check_files(folder)
  bank, arrays, neighbors = len(Bank(documents, vocab)), 0, 0
  for split in ("train", "heldout"):
    pairs = len(DocumentStore(documents / f"{split}_pairs", vocab))
    for name in ARRAYS:
      _read(folder / split / name, bank if split == "train" else pairs)
    names = ["ids", "scores"] + (["text_ids", "text_scores"] if split == "heldout" else [])
    for name in names:
      path = folder / f"{split}_pairs" / name
      values = _read(path, pairs).read_all()
      if name.endswith("ids"):
        check_ids(path, values, bank)
        neighbors += int((values >= 0).sum())
      elif not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"{path}, row {row} is not finite: run `cm3leon build_neighbors`.")
    arrays += len(ARRAYS) + len(names)
  return {"documents": bank, "arrays": arrays, "neighbors": neighbors}


def _read(path: epath.Path, rows: int) -> ArrayStore:
  """Reads all rows of an array. Raises UserError if one is damaged or their number is wrong."""
  store = ArrayStore(path)
  if len(store) != rows:
    raise UserError(
      f"{path} has {len(store)} rows for {rows} documents: run `cm3leon build_neighbors` again."
    )
  for start in range(0, rows, BLOCK):
    store[start : start + BLOCK]
  return store
