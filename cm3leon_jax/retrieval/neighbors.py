"""Selects neighbors of documents from the candidates of a search (CM3Leon, section 2.1)."""

# q queries, n documents, E width of embeddings, M candidates per side, C kept neighbors.

import collections
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import hashlib
import json
import time
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.config.data import RetrievalConfig
from cm3leon_jax.data.raw import reader
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.retrieval import index as index_lib
from cm3leon_jax.retrieval import lexical, removed
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.bank import Embeddings, EmbedJob, embed
from cm3leon_jax.stages.shards import Runner, forget, run_shards

REASONS = ("own_group", "similar_to_query", "unlike_query", "similar_to_kept")
# Split -> arrays of the results. The arrays text_* are of searches with the caption only.
RESULTS = {"train": ("ids", "scores"), "heldout": ("ids", "scores", "text_ids", "text_scores")}
QUERY_SHARE = 20  # A search shard has index_rows / QUERY_SHARE queries.
SELECT_BATCH = 1_024  # Number of documents whose candidates are in memory at a time.


def select_neighbors(
  sides: Iterable[np.ndarray],
  vectors: np.ndarray,
  query: np.ndarray,
  forbidden: Callable[[int], bool],
  kept_per_side: int,
  max_similarity: float,
  min_similarity: float = -1.0,
) -> tuple[list[int], collections.Counter[str]]:
  """Takes candidates from the sides alternately, best first, and keeps those that no rule rejects.

    text side [5 3 8], image side [3 9 8]; 5 is in the query's group; 9 and 3 are too similar
    result = [3 8]: 3 from the text side, because 5 is forbidden; then 8 from the image side,
    because 3 is already kept and 9 is too similar to 3

  Args:
    sides: an array of candidates per side, best first. Negative candidates are padding.
    vectors: [n, E] document embeddings of norm 1. A candidate is the index of a row of `vectors`.
    query: [E] embedding of norm 1.
    forbidden: returns whether a candidate is the query itself or in its group.
    max_similarity: largest cosine of a candidate and the query, and of two kept candidates.
    min_similarity: smallest cosine of a candidate and the query.

  Returns:
    The kept candidates, in the order in which they were kept, and a Counter of rejected candidates
    by reason (`REASONS`).
  """
  kept: list[int] = []
  rejected: collections.Counter[str] = collections.Counter()
  walks = [iter([int(c) for c in side if c >= 0]) for side in sides]
  for walk in walks * kept_per_side:
    for candidate in walk:
      if forbidden(candidate):
        rejected["own_group"] += 1
      elif vectors[candidate] @ query > max_similarity:
        rejected["similar_to_query"] += 1
      elif vectors[candidate] @ query < min_similarity:
        rejected["unlike_query"] += 1
      elif candidate in kept or (vectors[kept] @ vectors[candidate] > max_similarity).any():
        rejected["similar_to_kept"] += 1
      else:
        kept.append(candidate)
        break
  return kept, rejected


class Retriever:
  """Finds neighbors of documents or captions in the bank of a finished stage."""

  def __init__(self, folder: epath.PathLike, config: RetrievalConfig, **options: int):
    """Opens the bank. `options` are for `BlockIndex`. Raises UserError if the bank is absent."""
    folder = epath.Path(folder)
    self.bank, self.config = Embeddings(folder / "train"), config
    self.first = 0 if config.train_documents else self.bank.first_bank
    backend = index_lib.choose_backend(len(self), config.backend)
    self.index = index_lib.BlockIndex(
      self.bank.documents, backend, folder / "index", config.index_rows, self.first, **options
    )
    self.lexical = lexical.load(folder, config.lexical_weight, config.lexical_width)
    self.removed = removed.rows(folder)  # Rows of the bank that are never found.

  def __len__(self) -> int:
    """Returns the number of documents that can be retrieved."""
    return len(self.bank) - self.first

  def search(self, queries: np.ndarray) -> np.ndarray:
    """Finds the documents that are nearest to queries [q, E]. Returns ids [q, M], best first.

    Searches more documents until M that are not removed are found.
    """
    count = size = min(self.config.max_candidates, len(self))
    most = min(count + len(self.removed), len(self))
    while True:
      size = min(2 * size, most)  # Equals `count` if nothing is removed.
      ids = removed.dropped(self.index.search(queries, size)[0], self.removed)
      if size == most or (ids[:, count - 1] >= 0).all():
        return ids[:, :count]

  def select(
    self,
    sides: Sequence[np.ndarray],
    documents: np.ndarray,
    keys: np.ndarray,
    groups: np.ndarray,
    kept_per_side: int,
  ) -> tuple[np.ndarray, np.ndarray, collections.Counter[str]]:
    """Selects the neighbors of q documents, see `select_neighbors`.

    Args:
      sides: an array of candidates [q, M] per side, best first, padded with -1.
      documents: [q, E] embeddings of norm 1.
      keys: [q] uint64. A document of the bank with the same key is the query itself.
      groups: [q] uint64. 0 means that the document has no group.

    Returns:
      - ids of documents in the bank, [q, C] int32, padded with -1
      - cosines of these documents to `documents`, [q, C] float32, padded with 0
      - a Counter of rejected candidates by reason (`REASONS`)
    """
    counts: collections.Counter[str] = collections.Counter()
    ids = np.full((len(documents), kept_per_side * len(sides)), -1, np.int32)
    scores = np.zeros(ids.shape, np.float32)
    for start in range(0, len(documents), SELECT_BATCH):
      candidates = np.stack([side[start : start + SELECT_BATCH] for side in sides], axis=1)
      rows, places = np.unique(np.maximum(candidates, 0), return_inverse=True)
      places = np.where(candidates < 0, -1, places.reshape(candidates.shape))
      vectors = self.bank.documents[rows].astype(np.float32)
      bank_keys, bank_groups = self.bank.keys[rows], self.bank.groups[rows]
      for i, walks in enumerate(places, start):
        same = (bank_keys == keys[i]) | ((bank_groups == groups[i]) & (groups[i] != 0))
        kept, rejected = select_neighbors(
          walks,
          vectors,
          documents[i],
          same.__getitem__,
          kept_per_side,
          self.config.max_similarity,
          self.config.min_similarity,
        )
        counts.update(rejected)
        ids[i, : len(kept)] = rows[kept]
        scores[i, : len(kept)] = vectors[kept] @ documents[i]
    return ids, scores, counts

  def retrieve(
    self, queries: np.ndarray, count: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Selects neighbors for captions without image and group, as at inference.

    Args:
      queries: [q, E] text embeddings of norm 1, with the lexical part.
      count: C, at most `max_candidates`. Default: the number of neighbors of training documents.

    Returns:
      - ids of documents in the bank, [q, C] int32, best first, padded with -1
      - cosines of these documents to the queries, [q, C] float32
    """
    none, count = np.zeros(len(queries), np.uint64), count or 2 * self.config.kept_per_side
    return self.select([self.search(queries)], queries, none, none, count)[:2]


@dataclasses.dataclass(frozen=True)
class _IndexJob:
  """Job of `shards.run_shards` that builds the ScaNN indices of blocks of the bank."""

  folder: str
  config: RetrievalConfig

  def open(self) -> Callable[[str], dict]:
    index = Retriever(self.folder, self.config).index

    def build(name: str) -> dict:
      index.build_block(int(name))
      return {}

    return build


@dataclasses.dataclass(frozen=True)
class _SearchJob:
  """Job of `shards.run_shards` that finds the neighbors of blocks of documents.

  `blocks` maps the name of a block to its split, its first row, and the row after its last row.
  """

  folder: str
  config: RetrievalConfig
  blocks: dict[str, tuple[str, int, int]]

  def open(self) -> Callable[[str], dict]:
    retriever, folder = Retriever(self.folder, self.config), epath.Path(self.folder)

    def search_block(name: str) -> dict:
      split, start, stop = self.blocks[name]
      rows = Embeddings(folder / split)
      queries, images, documents = (
        array[start:stop].astype(np.float32)
        for array in (rows.queries, rows.images, rows.documents)
      )
      sides = [retriever.search(queries), retriever.search(images)]
      keys, groups = rows.keys[start:stop], rows.groups[start:stop]
      ids, scores, counts = retriever.select(
        sides, documents, keys, groups, self.config.kept_per_side
      )
      results = {"ids": ids, "scores": scores}
      if split == "heldout":
        results["text_ids"], results["text_scores"] = retriever.retrieve(queries)
      for array, values in results.items():
        ArrayStore(folder / f"{split}_pairs" / array).write(start, values)
      kept = ids >= 0
      numbers = {"kept": int(kept.sum()), "all_kept": int(kept.all(1).sum())}
      return {**counts, **numbers, "similarity": float(scores[kept].sum(dtype=np.float64))}

    return search_block


def build_neighbors(
  config: RetrievalConfig, job: EmbedJob, width: int, inputs: dict, runner: Runner
) -> dict:
  """Runs the stage: embeds pairs, builds the indices of the bank, and finds neighbors.

  The bank has the splits `train` and `bank`. Writes {split}/ (see `bank.Embeddings`), index/, and
  {split}_pairs/ (ids and scores, see `load_neighbors`) into `job.folder`. Finished work on the same
  pairs is reused. `width` is the embedding width of the CLIP model, which `inputs` identifies.
  Returns the figures for the report.
  """
  start, folder = time.monotonic(), epath.Path(job.folder)
  words = config.lexical_weight, config.lexical_width
  counted = lexical.count_words(job.raw, folder, *words, runner)
  job = dataclasses.replace(job, load_lexical=functools.partial(lexical.load, job.folder, *words))
  width += config.lexical_width if counted else 0
  embedded = embed(job, width, {**inputs, **counted}, runner)
  retriever = Retriever(folder, config)
  backend, bank, blocks = retriever.index.backend, len(retriever), retriever.index.blocks
  digest = hashlib.sha256(json.dumps(plain(embedded), sort_keys=True).encode())
  depends: dict[str, Any] = {"bank": digest.hexdigest()}
  if backend == "scann":
    shards = {f"{i:06d}": {**depends, "rows": rows} for i, rows in enumerate(blocks)}
    index_job, done = _IndexJob(job.folder, config), folder / "done" / "index"
    is_whole = retriever.index.has_block
    for _ in run_shards(index_job, shards, done, runner, "index blocks", is_whole):
      pass
  depends |= {"backend": backend, "retrieval": dataclasses.asdict(config)}
  summary = {"backend": backend, "bank": bank, **search_recall(retriever)}
  for split in ("train", "heldout"):
    count = sum(shard[f"{split}_pairs"] for shard in reader.shards(job.raw).values())
    summary |= _search(config, job.folder, split, count, depends, runner)
  summary["seconds"] = round(time.monotonic() - start, 1)
  print(
    f"neighbors: {bank} documents, {backend} search, recall@2 {summary['recall@2']:.3f}; "
    f"{summary['train_all_kept']:.1%} have all {2 * config.kept_per_side}, "
    f"{summary['train_rejection_rate']:.1%} of the candidates rejected, mean similarity "
    f"{summary['train_mean_similarity']:.2f}; {summary['seconds']:.0f} s.",
    flush=True,
  )
  return summary


def _search(
  config: RetrievalConfig, folder: str, split: str, count: int, depends: dict, runner: Runner
) -> dict:
  """Finds and writes the neighbors of a split's `count` pairs. Returns figures for the report."""
  path = epath.Path(folder)
  kept, row = True, (2 * config.kept_per_side,)
  for name in RESULTS[split]:
    dtype = np.int32 if name.endswith("ids") else np.float32
    kept &= ArrayStore.prepare(path / f"{split}_pairs" / name, row, dtype, count)
  size = max(1, config.index_rows // QUERY_SHARE)
  rows = [(split, first, min(first + size, count)) for first in range(0, count, size)]
  blocks = {f"{split}-{i:06d}": row for i, row in enumerate(rows)}
  shards = {name: {**depends, "rows": row} for name, row in blocks.items()}
  job, done = _SearchJob(folder, config, blocks), path / "done" / "search"
  if not kept:
    forget(done, blocks)
  total: collections.Counter[str] = collections.Counter()
  for _, numbers in run_shards(job, shards, done, runner, f"neighbors {split}"):
    total.update(numbers)
  for name in RESULTS[split]:
    ArrayStore(path / f"{split}_pairs" / name).commit(digest=True)
  looked_at = total["kept"] + sum(total[reason] for reason in REASONS)
  return {
    f"{split}_all_kept": total["all_kept"] / max(count, 1),
    f"{split}_mean_kept": total["kept"] / max(count, 1),
    f"{split}_mean_similarity": total["similarity"] / max(total["kept"], 1),
    f"{split}_candidates_looked_at": looked_at,
    **{f"{split}_rejected_{reason}": total[reason] for reason in REASONS},
    f"{split}_rejection_rate": 1 - total["kept"] / max(looked_at, 1),
  }


def search_recall(retriever: Retriever, k: int = 2, most: int = 1_000) -> dict[str, float]:
  """Measures recall@k against exact search, with up to `most` queries per side.

  Returns the recall of each side and the mean.
  """
  documents, first = retriever.bank.documents, retriever.first
  exact = index_lib.BlockIndex(documents, "exact", "", index_lib.EXACT_ROWS, first)
  recalls, rows = {}, np.arange(0, len(retriever.bank), -(-len(retriever.bank) // most))
  for name, array in (("text", retriever.bank.queries), ("image", retriever.bank.images)):
    queries = array[rows].astype(np.float32)
    recalls[f"{name}_recall@{k}"] = index_lib.recall_at_k(
      retriever.index.search(queries, k)[0], exact.search(queries, k)[0]
    )
  return {**recalls, f"recall@{k}": float(np.mean(list(recalls.values())))}


def load_neighbors(
  folder: epath.PathLike,
  name: str,
  text_only: bool = False,
  array: str = "ids",
  bank: int | None = None,
) -> np.ndarray:
  """Reads the neighbors of all documents in a store: [n, C] ids (int32) or similarities (float32).

  Args:
    name: "train_pairs" or "heldout_pairs".
    text_only: whether to read the neighbors that were searched with the caption only, without the
      image. They exist only for held-out pairs.
    array: "ids", without removed documents, or "scores", the similarities of all.
    bank: number of documents in the bank, to check the ids. None skips the check.

  Raises:
    UserError: the neighbors are absent or damaged, or an id is not in the bank.
  """
  path = epath.Path(folder) / name
  store = ArrayStore(path / (f"text_{array}" if text_only else array))
  values = store.read_all()
  if bank is not None:
    check_ids(store.path, values, bank)
  return removed.dropped(values, removed.rows(folder)) if array == "ids" else values


def check_ids(path: epath.PathLike, ids: np.ndarray, bank: int) -> None:
  """Raises UserError, with the row, if one of the ids [n, C] is neither -1 nor in the bank."""
  rows, places = np.nonzero((ids < -1) | (ids >= bank))
  if len(rows):
    row = int(rows[0])
    raise UserError(
      f"{path}, row {row}: neighbor {ids[row, places[0]]} of document {row} is not in the bank, "
      f"which has {bank} documents: run `cm3leon build_neighbors` again, on the documents "
      "of this bank."
    )
