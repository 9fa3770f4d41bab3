"""Writes the replay documents of a bundle, which `run.base_documents` finds."""

from etils import epath
import numpy as np

from cm3leon_jax.data.documents.store import Bank, DocumentStore, write_documents
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.retrieval import removed
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages, table

HELDOUT = 400  # Maximum number of held-out pairs.
GROUP = "group_size:256,zstd:19"  # A third of the size of records that are compressed one by one.


def write(folder: epath.Path, run: Run, most: int) -> None:
  """Writes a random sample of a run's pairs with their neighbors, unless the run has no pairs.

  `folder` then has the stages documents and neighbors of a workdir: at most `most` training pairs,
  at most `HELDOUT` held-out pairs, and, as the split `bank`, the best neighbors of these pairs, as
  many as precede a pair in training. Documents that were removed from the bank are left out.
  """
  settings, documents = run.settings, run.folder / "documents"
  vocab, kept = settings.vocab, max(1, settings.data.num_neighbors)
  # The name of each store -> the array of its neighbors, and the number of sampled pairs.
  of_splits = {"train_pairs": ("ids", most), "heldout_pairs": ("text_ids", HELDOUT)}
  stores = {name: DocumentStore(documents / name, vocab) for name in of_splits}
  if not all(map(len, stores.values())):
    return
  result, bank, gone = {}, Bank(documents, vocab), removed.rows(run.folder / "neighbors")
  for name, (array, number) in of_splits.items():
    rng = np.random.default_rng([settings.seed, len(stores[name])])
    rows = rng.permutation(len(stores[name]))
    rows = rows[~np.isin(rows, gone)] if name == "train_pairs" else rows
    rows = np.sort(rows[:number])
    write_documents(folder / "documents" / name, (stores[name][i] for i in rows), vocab, GROUP)
    ids = ArrayStore(run.folder / "neighbors" / name / array)[rows]
    result[name] = removed.dropped(ids, gone)[:, :kept]
  used = np.unique(np.concatenate([ids.ravel() for ids in result.values()]))
  used = used[used >= 0]
  write_documents(folder / "documents" / "bank_pairs", (bank[i] for i in used), vocab, GROUP)
  for name, ids in result.items():
    path = folder / "neighbors" / name / of_splits[name][0]
    places = np.searchsorted(used, ids) + len(result["train_pairs"])
    ArrayStore.create(path, ids.shape[1:], np.int32).append(np.where(ids < 0, -1, places))
  for stage in ("documents", "neighbors"):
    files = stages.describe_files(folder / stage, table.STAGES[stage].files)
    about = {"config": {}, "summary": {}, "seconds": 0.0}
    write_json(folder / stage / stages.DONE, {**about, "id": stages.id_of(files), "files": files})
