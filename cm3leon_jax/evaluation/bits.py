"""Bits per image code and per text token of held-out documents, with true, shuffled and no neighbors."""

# B batch, L length, K neighbors of a document, C stored candidates, n documents.

from typing import Annotated

import jax
import numpy as np
from pydantic import Field, PositiveInt
import pydantic.dataclasses
from scipy import stats
from tqdm import tqdm

from cm3leon_jax.config import STRICT, UserError
from cm3leon_jax.data import pipeline
from cm3leon_jax.data.plan import DataConfig
from cm3leon_jax.mesh import shard
from cm3leon_jax.models import transformer
from cm3leon_jax.training import loss

CONDITIONS = ("true", "shuffled", "none")
MODALITIES = ("image", "text")
ROW_MULTIPLE = 64  # Rows are padded to a multiple of it: few shapes to compile.


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
  """What `launch.evaluate` measures on held-out documents, after training."""

  num_documents: Annotated[int, Field(ge=2)] = 200
  """Number of held-out pairs that are scored, drawn once by the seed; all pairs if there are
  fewer."""
  batch_size: PositiveInt = 8
  """Rows scored at once; a multiple of the mesh's `data` x `fsdp`."""
  num_resamples: Annotated[int, Field(ge=100)] = 10_000
  """Number of bootstrap resamples, for the intervals."""


def unigram_bits(counts) -> np.ndarray:
  """Bits of each symbol under the add-one smoothed frequencies of `counts`.

    counts = [3, 0, 1]: probabilities 4/7, 1/7, 2/7, so bits = [0.807, 2.807, 1.807]

  Args:
    counts: [symbols] integers.

  Returns:
    [symbols] float64.
  """
  smoothed = np.asarray(counts, np.float64) + 1
  return np.log2(smoothed.sum()) - np.log2(smoothed)


def unigram_table(store, vocab) -> np.ndarray:
  """Bits of every id under two unigram models, of the image codes and of the text tokens of `store`.

  Args:
    store: DocumentStore of the training documents; all of their segments count.
    vocab: VocabLayout.

  Returns:
    [vocab.size] float64; NaN at the special tokens, which neither model knows.
  """
  counts = np.zeros(vocab.size, np.int64)
  for i in range(len(store)):
    for segment in store[i].segments:
      counts += np.bincount(segment.tokens, minlength=vocab.size)
  text, image = slice(vocab.num_special, vocab.text_size), slice(vocab.text_size, vocab.size)
  table = np.full(vocab.size, np.nan)
  table[text], table[image] = unigram_bits(counts[text]), unigram_bits(counts[image])
  return table


def derangement(n: int, rng: np.random.Generator) -> np.ndarray:
  """A random cycle through all of `n` >= 2 indices, [n]: nothing stays in its place."""
  order = rng.permutation(n)
  result = np.empty(n, np.int64)
  result[order] = np.roll(order, 1)
  return result


def fit_neighbors(document, neighbors, length: int):
  """The first of `neighbors` that fit before `document` in a row of `length` slots.

  Args:
    document: Document.
    neighbors: list of Document, the best first.
    length: slots of a row; a sample of T tokens takes T - 1.

  Raises:
    UserError: the document does not fit alone.
  """
  size = lambda d: sum(
    len(s.tokens) + 1 for s in d.segments
  )  # A <break> or </s> after each segment.
  left = length - size(document)
  if left < 0:
    raise UserError(
      f"held-out document '{document.key}' needs {length - left} slots; data.sequence_length is {length}."
    )
  kept = []
  for neighbor in neighbors:
    left -= size(neighbor)
    if left < 0:
      break
    kept.append(neighbor)
  return kept


def own_targets(sample, document, vocab) -> dict[str, np.ndarray]:
  """Which targets of a joined sample are the document's own image codes and text tokens.

    sample    </s> 7 <break> 91 <break> 8 9 <break> 92 </s>, the document: 8 9 <break> 92
    targets        7 <break> 91 <break> 8 9 <break> 92 </s>
    text           0    0     0    0    1 1    0     0   0
    image          0    0     0    0    0 0    0     1   0

  Neither `<break>` nor `</s>` is counted.

  Args:
    sample: [T] int32, the document last (`pipeline.join`).
    document: Document.
    vocab: VocabLayout.

  Returns:
    {"image", "text"}: [T - 1] bool.
  """
  targets = np.asarray(sample)[1:]
  size = sum(len(s.tokens) for s in document.segments) + len(document.segments) - 1
  own = np.arange(len(targets)) >= len(targets) - 1 - size
  image = own & vocab.is_image(targets)
  return {"image": image, "text": own & ~image & (targets >= vocab.num_special)}


def score_samples(
  params, model_config, samples, batch_size: int, progress=lambda rows: None
) -> list[np.ndarray]:
  """Negative log-likelihood of every target of `samples`, causal, one sample a row.

  Args:
    params: parameters of the decoder, on the current mesh (`jax.set_mesh`).
    model_config: ModelConfig of the decoder.
    samples: list of [T] int32, T <= model_config.max_positions + 1.
    batch_size: rows at once.
    progress: called with the number of samples scored since its last call.

  Returns:
    list of [T - 1] float64, in bits.
  """
  longest = max(len(s) for s in samples) - 1
  length = min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, model_config.max_positions)
  nll = jax.jit(
    lambda params, batch: loss.batch_nll(transformer.bind(model_config, params), batch)[1]
  )
  bits = []
  for start in range(0, len(samples), batch_size):
    part = samples[start : start + batch_size]
    filled = part + [part[-1]] * (batch_size - len(part))
    batch = {
      k: shard(v, "batch", "length") for k, v in pipeline.rows_of_samples(filled, length).items()
    }
    rows = np.asarray(jax.device_get(nll(params, batch)), np.float64) / np.log(2)
    bits += [row[: len(sample) - 1] for row, sample in zip(rows, part)]
    progress(len(part))
  return bits


def mean_interval(bits, tokens, num_resamples: int, seed: int) -> dict[str, float]:
  """Bits per token over documents, with a 95% interval: percentile bootstrap, whole documents resampled.

  Args:
    bits: [n] sums over a document's tokens, or paired differences of two such sums.
    tokens: [n] their number of tokens.
    num_resamples: bootstrap resamples.
    seed: of the bootstrap.

  Returns:
    {"bits", "low", "high"}.
  """
  rate = lambda b, t, axis=-1: b.sum(axis) / t.sum(axis)
  result = stats.bootstrap(
    (bits, tokens),
    rate,
    paired=True,
    vectorized=True,
    batch=500,
    n_resamples=num_resamples,
    method="percentile",
    rng=seed,
  )
  low, high = result.confidence_interval
  return {"bits": float(rate(bits, tokens)), "low": float(low), "high": float(high)}


def _samples(
  store, train_store, neighbor_ids, num_documents: int, data: DataConfig, vocab, seed: int
):
  """The documents drawn, and for each condition its samples and how many neighbors stand in them."""
  if len(store) < 2:
    raise UserError(f"{store.folder} has {len(store)} documents; evaluation compares at least 2.")
  rng = np.random.default_rng([seed, len(store)])
  chosen = np.sort(rng.permutation(len(store))[:num_documents])
  candidates = [[int(i) for i in neighbor_ids[j] if i >= 0][: data.num_neighbors] for j in chosen]
  partner = derangement(len(chosen), rng)
  ids = {
    "true": candidates,
    "shuffled": [candidates[p] for p in partner],
    "none": [[] for _ in chosen],
  }
  documents = [store[int(j)] for j in chosen]
  samples, counts = {}, {}
  for condition in CONDITIONS:
    kept = [
      fit_neighbors(d, [train_store[i] for i in k], data.sequence_length)
      for d, k in zip(documents, ids[condition])
    ]
    samples[condition] = [pipeline.join([*k, d], vocab) for k, d in zip(kept, documents)]
    counts[condition] = [len(k) for k in kept]
  return documents, samples, counts


def evaluate(
  params, model_config, train_store, heldout_store, neighbor_ids, vocab, data, config, seed
) -> dict:
  """Bits of held-out pairs, causal, without spans or drop, of the document itself only (`own_targets`).

  `true`: the document's own neighbors; `shuffled`: those of another document, so that form and number are alike
  and the content differs; `none`. A unigram model of the training pairs' codes and caption tokens stands beside
  them; the decoder spreads its probability over the whole vocabulary, the unigram only over its modality.

  Args:
    params: parameters of the decoder, on the current mesh (`jax.set_mesh`).
    model_config: ModelConfig of the decoder.
    train_store: DocumentStore of the training pairs.
    heldout_store: DocumentStore of the held-out pairs.
    neighbor_ids: [len(heldout_store), C] int32 indices into train_store, best first, -1 = none.
    vocab: VocabLayout.
    data: DataConfig; its first `num_neighbors` stand before a document, less those that do not fit a row.
    config: EvaluationConfig.
    seed: of the documents drawn, the shuffling and the bootstrap.

  Returns:
    Plain dict: documents, mean_neighbors (per condition), and per modality: tokens, unigram (bits), true, shuffled,
    none ({bits, low, high}), true_over_unigram, and the paired differences true_minus_shuffled and true_minus_none.

  Raises:
    UserError: fewer than two documents, or one that is longer than a row.
  """
  documents, samples, counts = _samples(
    heldout_store, train_store, neighbor_ids, config.num_documents, data, vocab, seed
  )
  masks = {c: [own_targets(s, d, vocab) for s, d in zip(samples[c], documents)] for c in CONDITIONS}
  with tqdm(
    total=len(documents) * len(CONDITIONS), desc="evaluate", unit="doc", mininterval=1
  ) as bar:
    together = score_samples(
      params, model_config, samples["true"] + samples["shuffled"], config.batch_size, bar.update
    )
    scored = {"true": together[: len(documents)], "shuffled": together[len(documents) :]}
    scored["none"] = score_samples(
      params, model_config, samples["none"], config.batch_size, bar.update
    )
  table = unigram_table(train_store, vocab)
  result = {
    "documents": len(documents),
    "mean_neighbors": {c: float(np.mean(counts[c])) for c in CONDITIONS},
  }
  for modality in MODALITIES:
    sums = {
      c: np.array([b[m[modality]].sum() for b, m in zip(scored[c], masks[c])]) for c in CONDITIONS
    }
    tokens = np.array([m[modality].sum() for m in masks["none"]], np.float64)
    own = np.concatenate([s[1:][m[modality]] for s, m in zip(samples["none"], masks["none"])])
    result[modality] = _compare(sums, tokens, float(table[own].mean()), config.num_resamples, seed)
  return result


def _compare(sums, tokens, unigram: float, num_resamples: int, seed: int) -> dict:
  interval = lambda bits: mean_interval(bits, tokens, num_resamples, seed)
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
  """One line of what `evaluate` found."""
  image = result["image"]
  delta = image["true_minus_shuffled"]
  return (
    f"{image['true']['bits']:.3f} bits per image code, {image['true_over_unigram']:.2f} x unigram {image['unigram']:.3f}, "
    f"true minus shuffled neighbors {delta['bits']:+.3f} [{delta['low']:+.3f}, {delta['high']:+.3f}], "
    f"{result['text']['true']['bits']:.3f} bits per text token, {result['documents']} documents"
  )
