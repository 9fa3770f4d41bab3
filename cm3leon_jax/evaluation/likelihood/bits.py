"""Measures the loss of held-out documents, in bits, with and without neighbors."""

# T tokens, C stored candidates of a document, n documents.

from collections.abc import Callable, Iterable, Sequence
import functools
from typing import Any

import jax
from jaxtyping import Array, Float
import numpy as np
import numpy.typing as npt

from cm3leon_jax import templates
from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.sampling import EvaluationConfig
from cm3leon_jax.data.documents.store import Bank, Document, DocumentStore
from cm3leon_jax.data.rows import loader
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.mesh import batch_shards, shard
from cm3leon_jax.models import transformer
from cm3leon_jax.templates import Lengths
from cm3leon_jax.training.step import loss
from cm3leon_jax.vocab import VocabLayout

CONDITIONS = ("true", "shuffled", "none")
MODALITIES = ("image", "text")
ROW_MULTIPLE = 64  # Rows are padded to a multiple of this, so that few shapes are compiled.


def check_batch(config: EvaluationConfig) -> None:
  """Raises UserError unless `config.batch_size` rows divide evenly over the current mesh."""
  parts = batch_shards()
  if config.batch_size % parts:
    raise UserError(
      f"config.evaluation.batch_size is {config.batch_size}; "
      f"mesh.data x mesh.fsdp x mesh.fsdp_inner = {parts} must divide it."
    )


def unigram_bits(counts: npt.ArrayLike) -> np.ndarray:
  """Computes -log2 p of each symbol, where p are the add-one smoothed frequencies of `counts`.

    counts = [3, 0, 1]: probabilities 4/7, 1/7, 2/7, so bits = [0.807, 2.807, 1.807]

  `counts` has [symbols] integers, and the result is [symbols] float64.
  """
  smoothed = np.asarray(counts, np.float64) + 1
  return np.log2(smoothed.sum()) - np.log2(smoothed)


def unigram_table(store: Bank | DocumentStore, vocab: VocabLayout) -> np.ndarray:
  """Computes -log2 p of every id under two unigram models: one of image codes, one of text.

  `store` has the training documents. Only its token counts are read. The result is [vocab.size]
  float64. Special tokens are in neither model, so their values are NaN.
  """
  counts = store.token_counts
  text, image = slice(vocab.num_special, vocab.text_size), slice(vocab.text_size, vocab.size)
  table = np.full(vocab.size, np.nan)
  table[text], table[image] = unigram_bits(counts[text]), unigram_bits(counts[image])
  return table


def partners(concepts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
  """Assigns each document a partner with another concept. Each document is a partner once.

    concepts = ["fox", "fox", "cat", "owl"]: [2 3 0 1] or [3 2 1 0]

  If one concept has more than half of the documents, some of its documents get a partner with the
  same concept. A document is never its own partner. `concepts` has n names, of which at least two
  must differ. The result is a permutation, [n] int64.
  """
  _, places, sizes = np.unique(concepts, return_inverse=True, return_counts=True)
  # `order` groups the documents by concept. Concepts and documents are in random order. A shift by
  # the size of the largest concept leads to a document with another concept.
  order = np.lexsort((rng.permutation(len(places)), rng.permutation(len(sizes))[places]))
  result = np.empty(len(places), np.int64)
  result[order] = np.roll(order, sizes.max())
  return result


def fit_neighbors(
  document: Document, neighbors: Iterable[Document], length: int, vocab: VocabLayout
) -> list[Document]:
  """Returns as many of the first `neighbors` as fit into a row before `document`.

  `neighbors` are sorted, best first. The row has `length` positions. A sample of T tokens takes
  T - 1 positions.

  Raises:
    UserError: the document does not fit even without neighbors.
  """
  template, last = templates.of(vocab), loader.lengths_of(document)
  needed = template.length([last]) - 1
  if needed > length:
    raise UserError(
      f"document '{document.key}' needs {needed} positions; the model was trained on {length}."
    )
  kept: list[Document] = []
  parts: list[Lengths] = []
  for neighbor in neighbors:
    parts.append(loader.lengths_of(neighbor))
    if template.length([*parts, last]) - 1 > length:
      break
    kept.append(neighbor)
  return kept


def places_in(document: Document, vocab: VocabLayout) -> tuple[list[tuple[int, int]], int]:
  """Returns the half-open ranges of the segments in the document alone, and its length."""
  template, parts = templates.of(vocab), [loader.lengths_of(document)]
  return template.bounds(parts), template.length(parts)


def own_targets(
  sample: np.ndarray, document: Document, vocab: VocabLayout
) -> dict[str, np.ndarray]:
  """Marks the targets of a joined sample that are image codes or text tokens of the document.

    sample    </s> 7 <break> 91 <break> 8 9 <break> 92 </s>, the document is 8 9 <break> 92
    targets        7 <break> 91 <break> 8 9 <break> 92 </s>
    text           0    0     0    0    1 1    0     0   0
    image          0    0     0    0    0 0    0     1   0

  `<break>` and `</s>` are not marked. `sample` ([T] int32) is a result of `loader.join`: first the
  neighbors, then the document. Returns {"image": mask, "text": mask}, each [T - 1] bool.
  """
  targets = np.asarray(sample)[1:]
  places, length = places_in(document, vocab)
  own = np.arange(len(targets)) >= len(targets) - (length - places[0][0])
  image = own & vocab.is_image(targets)
  return {"image": image, "text": own & ~image & (targets >= vocab.num_special)}


@functools.partial(jax.jit, static_argnums=0)
def _nll(model_config: ModelConfig, params: dict, batch: dict[str, Array]) -> Float[Array, "B L"]:
  """Computes the negative log-likelihood of each target in nats, replicated on every device."""
  return shard(loss.batch_nll(transformer.bind(model_config, params), batch)[1], None, None)


def score_samples(
  params: dict,
  model_config: ModelConfig,
  samples: Sequence[np.ndarray],
  vocab: VocabLayout,
  batch_size: int,
  progress: Callable[[int], object] = lambda rows: None,
  length: int | None = None,
) -> list[np.ndarray]:
  """Computes the negative log-likelihood of every token after the first, with one sample per row.

  Args:
    params: parameters of the decoder, on the current mesh (`jax.set_mesh`).
    samples: each is [T] int32, with T <= model_config.max_positions + 1.
    batch_size: rows in a batch, see `check_batch`.
    progress: called with the number of samples that were scored since its last call.
    length: positions of a row. Default: those of the longest sample, rounded up.

  Returns:
    For each sample, the bits of its targets, [T - 1] float64.
  """
  if length is None:
    longest = max(len(s) for s in samples) - 1
    length = min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, model_config.max_positions)
  bits: list[np.ndarray] = []
  for start in range(0, len(samples), batch_size):
    some = samples[start : start + batch_size]
    filled = [*some, *[some[-1]] * (batch_size - len(some))]
    arrays = loader.rows_of_samples(filled, length, vocab, model_config.align_images)
    batch = {name: shard(array, "batch", "length") for name, array in arrays.items()}
    rows = np.asarray(_nll(model_config, params, batch), np.float64) / np.log(2)
    bits += [row[: len(sample) - 1] for row, sample in zip(rows, some)]
    progress(len(some))
  return bits


def heldout_samples(
  store: DocumentStore,
  bank: Bank | DocumentStore,
  neighbor_ids: np.ndarray,
  num_documents: int,
  data: DataConfig,
  vocab: VocabLayout,
  seed: int,
) -> tuple[list[Document], list[str], dict[str, list[np.ndarray]], dict[str, list[int]]]:
  """Chooses held-out documents, and makes a sample of each document under each condition.

  A sample is a document after its neighbors. Returns the documents, their concepts, and for each
  condition the samples and their numbers of neighbors.
  """
  rng = np.random.default_rng([seed, len(store)])
  chosen = np.sort(rng.permutation(len(store))[:num_documents])
  # A document without a concept gets a concept that no other document has.
  concepts = [str(store.concepts[j] or f"document {j}") for j in chosen]
  candidates = [[int(i) for i in neighbor_ids[j] if i >= 0][: data.num_neighbors] for j in chosen]
  partner = partners(concepts, rng)
  ids: dict[str, list[list[int]]] = {
    "true": candidates,
    "shuffled": [candidates[p] for p in partner],
    "none": [[] for _ in chosen],
  }
  documents = [store[int(j)] for j in chosen]
  samples: dict[str, list[np.ndarray]] = {}
  counts: dict[str, list[int]] = {}
  for condition in CONDITIONS:
    kept = [
      fit_neighbors(d, [bank[i] for i in k], data.sequence_length, vocab)
      for d, k in zip(documents, ids[condition])
    ]
    samples[condition] = [loader.join([*k, d], vocab) for k, d in zip(kept, documents)]
    counts[condition] = [len(k) for k in kept]
  return documents, concepts, samples, counts


def evaluate(
  params: dict,
  model_config: ModelConfig,
  bank: Bank | DocumentStore,
  heldout_store: DocumentStore,
  neighbor_ids: np.ndarray,
  vocab: VocabLayout,
  data: DataConfig,
  config: EvaluationConfig,
  seed: int,
) -> dict[str, Any]:
  """Measures the loss of held-out pairs in bits, by causal prediction without spans or dropout.

  Only targets of the document itself count (`own_targets`). There are three conditions:
  - `true`: the document follows its own neighbors.
  - `shuffled`: the document follows the neighbors of a document with another concept. Form and
    number of the neighbors are similar, but their content differs.
  - `none`: the document has no neighbors.

  For comparison, the bits under a unigram model of the training pairs are computed, which spreads
  its probability over one modality; the decoder spreads it over the whole vocabulary.

  Args:
    params: parameters of the decoder, on the current mesh (`jax.set_mesh`).
    bank: the bank, or the store of the training pairs.
    neighbor_ids: [len(heldout_store), C] int32 indices into `bank`, best first. -1 means none.

  Returns:
    A dict with `documents`, `mean_neighbors` (per condition), and a dict per modality. The dict of
    a modality has `tokens`, `unigram` (bits), `true_over_unigram`, the conditions `true`,
    `shuffled` and `none`, and the paired differences `true_minus_shuffled` and `true_minus_none`.
    Each condition and each difference is {bits, low, high, groups, effective_groups}, with an
    interval over concepts (`intervals.mean_interval`).

  Raises:
    UserError: there are fewer than two concepts, or a document is longer than a row.
  """
  chosen = (heldout_store, bank, neighbor_ids, config.num_documents, data, vocab, seed)
  documents, concepts, samples, counts = heldout_samples(*chosen)
  if len(set(concepts)) < 2:
    raise UserError(
      f"the documents chosen from {heldout_store.folder} ({len(documents)}) show fewer than two "
      "concepts, but a confidence interval needs at least two: hold out more concepts."
    )
  masks = {c: [own_targets(s, d, vocab) for s, d in zip(samples[c], documents)] for c in CONDITIONS}
  scored = _score_conditions(params, model_config, samples, vocab, config.batch_size)
  table = unigram_table(bank, vocab)
  result: dict[str, Any] = {
    "documents": len(documents),
    "mean_neighbors": {c: float(np.mean(counts[c])) for c in CONDITIONS},
  }
  for modality in MODALITIES:
    sums = {
      c: np.array([b[m[modality]].sum() for b, m in zip(scored[c], masks[c])]) for c in CONDITIONS
    }
    tokens = np.array([m[modality].sum() for m in masks["none"]], np.float64)
    own = np.concatenate([s[1:][m[modality]] for s, m in zip(samples["none"], masks["none"])])
    resampling = {"groups": concepts, "num_resamples": config.num_resamples, "seed": seed}
    result[modality] = _compare(sums, tokens, float(table[own].mean()), resampling)
  return result


def _score_conditions(
  params: dict,
  model_config: ModelConfig,
  samples: dict[str, list[np.ndarray]],
  vocab: VocabLayout,
  batch_size: int,
) -> dict[str, list[np.ndarray]]:
  """Scores the samples of every condition, with a progress bar."""
  n = len(samples["none"])
  with progress_bar(total=n * len(CONDITIONS), desc="evaluate", unit="doc") as bar:

    def score(rows: list[np.ndarray]) -> list[np.ndarray]:
      return score_samples(params, model_config, rows, vocab, batch_size, bar.update)

    # One call scores both conditions that have neighbors, so that one program is compiled for them.
    together = score(samples["true"] + samples["shuffled"])
    return {"true": together[:n], "shuffled": together[n:], "none": score(samples["none"])}


def _compare(
  sums: dict[str, np.ndarray], tokens: np.ndarray, unigram: float, resampling: dict[str, Any]
) -> dict[str, Any]:
  def interval(bits: np.ndarray) -> dict[str, Any]:
    result = intervals.mean_interval(bits, tokens, **resampling)
    return {"bits": result.pop("mean"), **result}

  levels = {c: interval(sums[c]) for c in CONDITIONS}
  return {
    "tokens": int(tokens.sum()),
    "unigram": unigram,
    **levels,
    "true_over_unigram": levels["true"]["bits"] / unigram,
    "true_minus_shuffled": interval(sums["true"] - sums["shuffled"]),
    "true_minus_none": interval(sums["true"] - sums["none"]),
  }


def describe(result: dict) -> str:
  """Summarizes the result of `evaluate` in one line."""
  image = result["image"]
  delta = image["true_minus_shuffled"]
  return (
    f"{image['true']['bits']:.3f} bits per image code, {image['true_over_unigram']:.2f} x unigram "
    f"{image['unigram']:.3f}, true minus shuffled neighbors {delta['bits']:+.3f} "
    f"[{delta['low']:+.3f}, {delta['high']:+.3f}], {result['text']['true']['bits']:.3f} bits per "
    f"text token, {result['documents']} documents of {intervals.describe_groups(delta)}"
  )
