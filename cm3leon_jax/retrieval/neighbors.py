"""Which train documents stand before a document: candidates by text and by image, pruned (CM3Leon, section 2.1)."""

# n bank documents, q queries, E embedding, M candidates per side, C candidates kept.

import collections
import dataclasses
import functools
import hashlib
import time

from etils import epath
import numpy as np
from tqdm import tqdm

from cm3leon_jax.config import UserError
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.retrieval import index as index_lib
from cm3leon_jax.retrieval.clip import CLIP, normalize
from cm3leon_jax.retrieval.hf_clip import HFCLIP

BANK = "bank.npz"
EMBED_CHUNK = 512
READ_THREADS = 8
REASONS = ("own_group", "similar_to_query", "similar_to_kept")


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
  """How neighbours are chosen.

  Attributes:
    clip: folder of a Hugging Face CLIP checkpoint that embeds (in bf16); "": the run's own, of the stage `clip`.
    backend: of the index, see `index.build_index`.
    max_candidates: M, how far each side's list is walked.
    kept_per_side: candidates kept from the text side and from the image side; C is twice that (paper: 2 and 2).
    max_similarity: a candidate more similar than this to the document, or to one already kept, is skipped (paper: 0.9).
    query_dropout: share of the caption's tokens that is left out when a training document is the query (paper: 20%).
  """

  clip: str = ""
  backend: str = "auto"
  max_candidates: int = 64
  kept_per_side: int = 2
  max_similarity: float = 0.9
  query_dropout: float = 0.2

  def __post_init__(self):
    if self.backend not in index_lib.BACKENDS:
      raise ValueError(f"backend is '{self.backend}'; it must be one of {', '.join(index_lib.BACKENDS)}.")
    if self.kept_per_side < 1 or self.max_candidates < self.kept_per_side:
      raise ValueError(
        f"max_candidates is {self.max_candidates} and kept_per_side {self.kept_per_side}; "
        "at least one must be kept per side, out of at least as many candidates."
      )
    if not -1 <= self.max_similarity <= 1:
      raise ValueError(f"max_similarity is {self.max_similarity}; a cosine lies in [-1, 1].")
    if not 0 <= self.query_dropout < 1:
      raise ValueError(f"query_dropout is {self.query_dropout}; it must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class Bank:
  """Documents that can be retrieved. All are caption-image pairs, so that every one is multimodal.

  Attributes:
    texts: [n, E] float32 embeddings of norm 1.
    images: [n, E] likewise.
    groups: [n] str; near-duplicates share one, "" is no group.
    keys: [n] str, the documents' names.
  """

  texts: np.ndarray
  images: np.ndarray
  groups: np.ndarray
  keys: np.ndarray

  @property
  def documents(self) -> np.ndarray:
    """[n, E]: the normalised mean of a document's parts; what is searched and what similarity means."""
    return document_embeddings(self.texts, self.images)

  def save(self, path: epath.PathLike) -> None:
    write_arrays(path, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

  @classmethod
  def load(cls, path: epath.PathLike) -> "Bank":
    """Raises UserError if `build_neighbors` has not written `path`."""
    return cls(**read_arrays(path))


def document_embeddings(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
  """Embeddings [q, E] of both parts -> normalised mean [q, E]."""
  return np.asarray(normalize((texts + images) / 2))


def drop_tokens(ids: np.ndarray, share: float, key: str, seed: int) -> np.ndarray:
  """Leaves out `share` of the ids at random, the same ones for the same (key, seed); at least one id stays."""
  digest = hashlib.sha256(key.encode()).digest()
  rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
  order = rng.random(len(ids))
  kept = order >= share
  kept[np.argmax(order)] = True
  return ids[kept]


def select_neighbors(sides, vectors, query, forbidden, kept_per_side: int, max_similarity: float):
  """Walks the candidates of the sides in turn, best first, and keeps those that no rule forbids.

    max_similarity 0.9, text side [5 3 8], image side [3 9 8], 5 in the query's group, 9 at 0.95 to 3
    result = [3 8]: 3 from the text side, then 8 from the image side (3 is kept already, 9 is too close to it)

  Args:
    sides: arrays of candidates, best first, one per side; negative ones are skipped.
    vectors: [n, E] document embeddings of norm 1, which candidates are rows of.
    query: [E] embedding of norm 1 to which no kept one may be too similar.
    forbidden: candidate -> whether it is the query itself or of its group.
    kept_per_side: candidates kept from each side.
    max_similarity: largest cosine to the query and among the kept.

  Returns:
    The kept candidates in the order of the turns, and a Counter of rejections by reason (of `REASONS`).
  """
  kept: list[int] = []
  rejected = collections.Counter()
  walks = [iter([int(c) for c in side if c >= 0]) for side in sides]
  for walk in walks * kept_per_side:
    for candidate in walk:
      if forbidden(candidate):
        rejected["own_group"] += 1
      elif vectors[candidate] @ query > max_similarity:
        rejected["similar_to_query"] += 1
      elif candidate in kept or (vectors[kept] @ vectors[candidate] > max_similarity).any():
        rejected["similar_to_kept"] += 1
      else:
        kept.append(candidate)
        break
  return kept, rejected


class Retriever:
  """Searches a bank: for documents with both parts, and for captions alone."""

  def __init__(self, bank: Bank, config: RetrievalConfig):
    self.bank, self.config = bank, config
    self.vectors = bank.documents
    self.index = index_lib.build_index(self.vectors, config.backend)

  def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[q, E] -> the M nearest documents: ids and cosines [q, M]."""
    return self.index.search(queries, min(self.config.max_candidates, len(self.vectors)))

  def select(self, sides, documents, keys, groups, kept_per_side: int, bar: str = ""):
    """Neighbours of q documents.

    Args:
      sides: one [q, M] array of candidates per side, best first.
      documents: [q, E] embeddings of norm 1 to which similarity is measured.
      keys: [q] names; a bank document of the same key is the query itself.
      groups: [q]; "" is no group.
      kept_per_side: candidates kept from each side.
      bar: name of the progress bar; "" for none.

    Returns:
      ids [q, C] int32 into the bank (-1 = none, last), their cosines to `documents` [q, C] float32 (0 where none), and a
      Counter of rejections by reason.
    """
    counts = collections.Counter()
    ids = np.full((len(documents), kept_per_side * len(sides)), -1, np.int32)
    scores = np.zeros(ids.shape, np.float32)
    for i in tqdm(range(len(documents)), bar, mininterval=1, unit="document", disable=not bar):
      forbidden = functools.partial(self._is_same, keys[i], groups[i])
      candidates = [side[i] for side in sides]
      kept, rejected = select_neighbors(
        candidates, self.vectors, documents[i], forbidden, kept_per_side, self.config.max_similarity
      )
      counts.update(rejected)
      ids[i, : len(kept)] = kept
      scores[i, : len(kept)] = self.vectors[kept] @ documents[i]
    return ids, scores, counts

  def _is_same(self, key: str, group: str, candidate: int) -> bool:
    return self.bank.keys[candidate] == key or (group != "" and self.bank.groups[candidate] == group)

  def retrieve(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours for captions alone, as at inference: nothing is known of the image or of a group.

    Args:
      queries: [q, E] text embeddings.

    Returns:
      ids [q, C] int32 into the bank, best first (-1 = none, last), and their cosines to the queries [q, C] float32.
    """
    nobody = np.full(len(queries), "")
    ids, scores, _ = self.select([self.search(queries)[0]], queries, nobody, nobody, 2 * self.config.kept_per_side)
    return ids, scores


def embed_pairs(clip: CLIP | HFCLIP, pairs: list[raw_pairs.RawPair], dropout: float, seed: int) -> tuple[Bank, np.ndarray]:
  """Embeds both parts of `pairs`: a bank of them, and the captions once more [n, E] as queries with `dropout`."""
  texts, queries, images = [], [], []
  for start in tqdm(range(0, len(pairs), EMBED_CHUNK), "embed", mininterval=1, unit="chunk"):
    chunk = pairs[start : start + EMBED_CHUNK]
    ids = [clip.encode(p.caption) for p in chunk]
    texts.append(clip.embed_texts(ids))
    queries.append(
      clip.embed_texts([drop_tokens(x, dropout, p.key, seed) for x, p in zip(ids, chunk)]) if dropout else texts[-1]
    )
    images.append(clip.embed_images(raw_pairs.load_images([p.image for p in chunk], clip.resolution, READ_THREADS)))
  groups, keys = np.array([p.group for p in pairs]), np.array([p.key for p in pairs])
  return Bank(np.concatenate(texts), np.concatenate(images), groups, keys), np.concatenate(queries)


def build_neighbors(config: RetrievalConfig, clip: CLIP | HFCLIP, raw_folder, folder, seed: int) -> dict:
  """The stage: embeds raw/, writes bank.npz and {train,heldout}_pairs.npz; the bank is the train pairs in their order.

  train_pairs.npz: ids and scores. heldout_pairs.npz also text_ids and text_scores: the neighbours by caption alone.

  Args:
    config: the rules.
    clip: embeds; has `encode`, caption -> ids, of which the query dropout leaves some out.
    raw_folder: holds pairs.jsonl and images.
    folder: where the results go.
    seed: of the query dropout.

  Returns:
    The numbers for the report.
  """
  start, folder = time.time(), epath.Path(folder)
  train, heldout = raw_pairs.read_pairs(raw_folder, "train"), raw_pairs.read_pairs(raw_folder, "heldout")
  if not train:
    raise UserError(f"{raw_folder} has no train pairs; neighbours need at least one.")
  bank, queries = embed_pairs(clip, train, config.query_dropout, seed)
  folder.mkdir(parents=True, exist_ok=True)
  bank.save(folder / BANK)
  retriever = Retriever(bank, config)
  summary = {"backend": retriever.index.backend, "bank": len(train)}
  summary.update(search_recall(retriever, {"text": queries, "image": bank.images}))
  summary.update(_write_split(folder / "train_pairs.npz", retriever, bank, queries, "train"))
  if heldout:
    held, held_queries = embed_pairs(clip, heldout, 0.0, seed)
    summary.update(_write_split(folder / "heldout_pairs.npz", retriever, held, held_queries, "heldout"))
  summary["seconds"] = round(time.time() - start, 1)
  print(
    f"neighbors: {summary['bank']} documents, {summary['backend']} search, recall@2 {summary['recall@2']:.3f}; "
    f"{summary['train_all_kept']:.1%} have all {2 * config.kept_per_side}, "
    f"mean similarity {summary['train_mean_similarity']:.2f}; {summary['seconds']:.0f} s.",
    flush=True,
  )
  return summary


def _write_split(path, retriever: Retriever, split: Bank, queries: np.ndarray, name: str) -> dict:
  """Chooses and writes the neighbours of `split`; returns its numbers."""
  sides = [retriever.search(queries)[0], retriever.search(split.images)[0]]
  ids, scores, counts = retriever.select(
    sides, split.documents, split.keys, split.groups, retriever.config.kept_per_side, f"neighbors {name}"
  )
  arrays = {"ids": ids, "scores": scores}
  if name == "heldout":
    text_ids, text_scores = retriever.retrieve(queries)
    arrays.update(text_ids=text_ids, text_scores=text_scores)
  write_arrays(path, arrays)
  looked_at = sum(counts.values()) + int((ids >= 0).sum())
  return {
    f"{name}_all_kept": float((ids >= 0).all(1).mean()),
    f"{name}_mean_kept": float((ids >= 0).sum(1).mean()),
    f"{name}_mean_similarity": float(scores[ids >= 0].mean()) if (ids >= 0).any() else 0.0,
    f"{name}_candidates_looked_at": looked_at,
    **{f"{name}_rejected_{reason}": counts[reason] for reason in REASONS},
    f"{name}_rejection_rate": 1 - int((ids >= 0).sum()) / max(looked_at, 1),
  }


def search_recall(retriever: Retriever, sides: dict[str, np.ndarray], k: int = 2, most: int = 1_000) -> dict[str, float]:
  """recall@k of the retriever's index against exact search, on up to `most` queries of each side and over all."""
  exact = index_lib.ExactIndex(retriever.vectors)
  recalls = {}
  for name, queries in sides.items():
    queries = queries[:: -(-len(queries) // most)]
    recalls[f"{name}_recall@{k}"] = index_lib.recall_at_k(retriever.index.search(queries, k)[0], exact.search(queries, k)[0])
  return {**recalls, f"recall@{k}": float(np.mean(list(recalls.values())))}


def load_neighbors(folder: epath.PathLike, name: str, text_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """ids [n, C] int32 and scores [n, C] of `{name}.npz`; `text_only`: of the caption alone, which only held-out files have.

  Raises:
    UserError: the file is absent, or has no text-only neighbours.
  """
  path = epath.Path(folder) / f"{name}.npz"
  arrays, prefix = read_arrays(path), "text_" if text_only else ""
  if prefix + "ids" not in arrays:
    raise UserError(f"{path} has no neighbours by caption alone; only held-out pairs have them.")
  return arrays[prefix + "ids"], arrays[prefix + "scores"]


def write_arrays(path: epath.PathLike, arrays: dict[str, np.ndarray]) -> None:
  """Writes an .npz file atomically."""
  path = epath.Path(path)
  partial = path.parent / (path.name + ".partial")
  with partial.open("wb") as file:
    np.savez(file, **arrays)
  partial.replace(path)


def read_arrays(path: epath.PathLike) -> dict[str, np.ndarray]:
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f"{path} does not exist: run `python -m launch.build_neighbors` first.")
  with path.open("rb") as file, np.load(file) as arrays:
    return dict(arrays)
