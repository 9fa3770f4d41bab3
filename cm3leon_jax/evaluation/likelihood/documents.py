"""Scores documents token by token: log-probabilities, sums by modality, perplexity.

Documents are scored in parts, and each part is a file. Therefore a command that was killed can
continue after the last finished part.
"""

# T tokens of a sample: </s>, the neighbors, the document, </s>.

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import json
from typing import Any, SupportsFloat

from etils import epath
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.data.documents.store import Bank, Document, first_documents, group_id
from cm3leon_jax.data.rows import loader
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.evaluation.likelihood.document_files import Documents
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.vocab import VocabLayout

SCORES, SUMMARY, PARTS = "scores.jsonl", "summary.json", "parts"
PART = 256  # Number of documents per part.
MODALITIES = ("text", "image", "special")  # "special": <break> and the </s> at the end.
DIGITS = 6  # Number of decimal places of written log-probabilities.


@dataclasses.dataclass(frozen=True)
class Search:
  """Finds up to `count` neighbors of a pair by its text, as at inference. Excludes this pair."""

  count: int
  retriever: Retriever
  bank: Bank
  clip: CLIP | HFCLIP
  layout: PromptLayout

  def __call__(self, documents: Sequence[Document]) -> list[tuple[Document, ...]]:
    """Returns the neighbors of each document, best first. Only pairs have neighbors."""
    result: list[tuple[Document, ...]] = [()] * len(documents)
    kinds = [[segment.is_image for segment in document.segments] for document in documents]
    pairs = [i for i, of_document in enumerate(kinds) if of_document == [False, True]]
    if not pairs:
      return result
    encode = self.clip.encode
    assert encode is not None
    texts = [self.layout.decode(documents[i].segments[0].tokens) for i in pairs]
    embedded = self.clip.embed_texts([encode(text) for text in texts])
    queries = self.retriever.lexical.join(embedded, texts)
    keys = np.array([group_id(documents[i].key) for i in pairs], np.uint64)
    sides = [self.retriever.search(queries)]
    ids, _, _ = self.retriever.select(sides, queries, keys, np.zeros_like(keys), self.count)
    for i, row in zip(pairs, ids):
      result[i] = first_documents(self.bank, row, self.count)
    return result


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Scores documents with a trained decoder. Each document follows its neighbors.

  Attributes:
    params: parameters of the decoder, on the current mesh (`jax.set_mesh`).
    positions: number of positions of a row in training.
    batch_size: rows in a batch, see `bits.check_batch`.
    find: returns the neighbors of each document, best first. None if documents have no neighbors.
  """

  params: dict
  model: ModelConfig
  vocab: VocabLayout
  positions: int
  batch_size: int
  find: Callable[[Sequence[Document]], list[tuple[Document, ...]]] | None = None

  def score(self, documents: Sequence[Document]) -> list[dict]:
    """Returns the fields of each document's line in scores.jsonl, see `line_of`."""
    result = [()] * len(documents) if self.find is None else self.find(documents)
    kept = [
      bits.fit_neighbors(document, neighbors, self.positions, self.vocab)
      for document, neighbors in zip(documents, result)
    ]
    samples = [loader.join([*k, d], self.vocab) for k, d in zip(kept, documents)]
    lengths = np.array([row_length(len(s) - 1, self.model.max_positions) for s in samples])
    nats: dict[int, np.ndarray] = {}
    for length in np.unique(lengths):
      members = np.flatnonzero(lengths == length)
      scored = bits.score_samples(
        self.params,
        self.model,
        [samples[i] for i in members],
        self.vocab,
        self.batch_size,
        length=int(length),
      )
      nats |= {int(i): -np.log(2) * row for i, row in zip(members, scored)}
    return [
      line_of(document, sample, nats[i], [n.key for n in neighbors], self.vocab)
      for i, (document, sample, neighbors) in enumerate(zip(documents, samples, kept))
    ]


def row_length(positions: int, most: int) -> int:
  """Rounds `positions` up to 64, 128, 256, ... or `most`, so that few shapes are compiled.

  >>> [row_length(n, 400) for n in (3, 64, 65, 300)]
  [64, 64, 128, 400]
  """
  length = bits.ROW_MULTIPLE
  while length < positions:
    length *= 2
  return min(length, most)


def line_of(
  document: Document,
  sample: np.ndarray,
  log_probs: np.ndarray,
  neighbors: list[str],
  vocab: VocabLayout,
) -> dict:
  """Makes the fields of a document's line in scores.jsonl, without the tokens of its neighbors.

    document: 8 9 <break> 92, after a neighbor
    tokens    = [</s> 8 9 <break> 92 </s>]
    log_probs = [null a b c d e]
    segments  = [{"text", 1 to 3, a + b}, {"image", 4 to 5, d}], special = c + e

  `sample` ([T] int32, from `loader.join`) has the neighbors and the document. `log_probs` ([T - 1],
  in nats) has one number for each target of the sample. `neighbors` are the keys of the neighbors.
  """
  own = bits.own_targets(sample, document, vocab)
  tokens = loader.join([document], vocab)
  targets = len(tokens) - 1
  own["special"] = ~own["text"] & ~own["image"] & (np.arange(len(log_probs))[::-1] < targets)
  alone, segments = log_probs[-targets:], []
  places, _ = bits.places_in(document, vocab)
  for segment, (start, stop) in zip(document.segments, places):
    segments.append(
      {
        "modality": "image" if segment.is_image else "text",
        "start": start,
        "stop": stop,
        "log_prob": _rounded(alone[start - 1 : stop - 1].sum()),
      }
    )
  sums = {
    name: {"tokens": int(own[name].sum()), "log_prob": _rounded(log_probs[own[name]].sum())}
    for name in MODALITIES
  }
  return {
    "key": document.key,
    "concept": document.concept,
    "neighbors": neighbors,
    "tokens": tokens.tolist(),
    "log_probs": [None, *map(_rounded, alone)],
    "segments": segments,
    **sums,
    "log_prob": _rounded(alone.sum()),
  }


def _rounded(log_prob: SupportsFloat) -> float:
  return round(float(log_prob), DIGITS)


def run(
  scorer: Scorer,
  documents: Documents,
  folder: epath.PathLike,
  *,
  part: int = PART,
  num_resamples: int = intervals.NUM_RESAMPLES,
  seed: int = 0,
) -> dict:
  """Scores all documents and writes scores.jsonl. Existing parts are kept.

  All processes of a job must call this function. The first process writes the files. Until all
  parts are done, they are in parts/ in `folder`. A part has `part` documents. `num_resamples` and
  `seed` are for the confidence intervals. Returns the result of `summary`.
  """
  folder = epath.Path(folder)
  starts = range(0, len(documents), part)
  files = [folder / PARTS / f"{start // part:06d}.jsonl" for start in starts]
  # The first process decides which parts all processes score.
  absent = distributed.gather([i for i, file in enumerate(files) if not file.exists()])[0]
  for i in progress_bar(absent, desc="score", unit="part", disable=not distributed.is_first()):
    rows = range(starts[i], min(starts[i] + part, len(documents)))
    lines = scorer.score([documents[row] for row in rows])
    if distributed.is_first():
      with replacing(files[i], "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
  result = None
  with distributed.together():
    if distributed.is_first():
      result = summary(_join(files, folder), num_resamples, seed)
  return distributed.gather(result)[0]


def _join(files: Sequence[epath.Path], folder: epath.Path) -> Iterator[dict]:
  """Concatenates the parts into scores.jsonl, yields their lines, and removes the parts."""
  with replacing(folder / SCORES, "w") as file:
    for path in files:
      for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        file.write(line)
        yield json.loads(line)
  (folder / PARTS).rmtree()


def summary(lines: Iterable[dict], num_resamples: int, seed: int) -> dict:
  """Computes the figures of all documents and of each modality.

    2 tokens with log-probabilities -1.386 and 0: bits 1.0, perplexity 2.0

  Intervals resample groups. A group is all documents with one concept, or a single document without
  a concept.

  Args:
    lines: the line of each document, see `line_of`.
    num_resamples: number of resamples for the confidence intervals.
    seed: seed of the resamples.

  Returns:
    {"documents", "mean_neighbors", "text", "image", "special"}. A modality without tokens is None.
    The others have `documents`, `tokens`, `log_prob` (nats), `bits` (per token) with the 95%
    interval `low` and `high`, `perplexity` with the 95% interval `perplexity_low` and
    `perplexity_high`, `groups` and `effective_groups`. If there is one group, intervals are None.
  """
  groups: dict[str, int] = {}
  places: list[int] = []
  neighbors = 0
  counts: dict[str, list[int]] = {name: [] for name in MODALITIES}
  sums: dict[str, list[float]] = {name: [] for name in MODALITIES}
  for line in lines:
    name = line["concept"] or f"document {len(places)}"
    places.append(groups.setdefault(name, len(groups)))
    neighbors += len(line["neighbors"])
    for name in MODALITIES:
      counts[name].append(line[name]["tokens"])
      sums[name].append(line[name]["log_prob"])
  result: dict[str, Any] = {
    "documents": len(places),
    "mean_neighbors": neighbors / len(places),
  }
  for name in MODALITIES:
    tokens, log_probs = (np.bincount(places, values) for values in (counts[name], sums[name]))
    result[name] = None
    if tokens.any():
      used = tokens > 0
      numbers = _numbers_of_groups(tokens[used], log_probs[used], num_resamples, seed)
      result[name] = {"documents": int(np.count_nonzero(counts[name])), **numbers}
  return result


def _numbers_of_groups(
  tokens: np.ndarray, log_probs: np.ndarray, num_resamples: int, seed: int
) -> dict[str, Any]:
  """Computes the figures of a modality from the sums of its groups, see `summary`."""
  groups = np.arange(len(tokens))
  result = intervals.mean_interval(-log_probs / np.log(2), tokens, groups, num_resamples, seed)
  ends = {f"perplexity_{end}": result[end] for end in ("low", "high")}
  return {
    "tokens": int(tokens.sum()),
    "log_prob": float(log_probs.sum()),
    "bits": result.pop("mean"),
    **result,
    "perplexity": float(np.exp(-log_probs.sum() / tokens.sum())),
    **{name: None if x is None else 2.0**x for name, x in ends.items()},
  }


def describe(result: dict) -> str:
  """Formats the figures of text and image in a `summary` as one line."""
  parts = []
  for name in ("text", "image"):
    if (found := result[name]) is not None:
      ends = "" if found["low"] is None else " [{perplexity_low:.4g}, {perplexity_high:.4g}]"
      parts.append(
        f"{name}: perplexity {found['perplexity']:.4g}{ends.format(**found)}, "
        f"{found['bits']:.3f} bits a token, {_counted(found['tokens'], 'token')}"
      )
  return f"{_counted(result['documents'], 'document')}; {'; '.join(parts)}"


def _counted(count: int, noun: str) -> str:
  return f"{count:,} {noun}{'s' * (count > 1)}"
