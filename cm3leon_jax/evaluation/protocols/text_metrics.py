"""Computes metrics of captions and answers. All values are multiplied by 100, as in papers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.metrics import answers, ptb
from cm3leon_jax.evaluation.metrics import captions as caption_metrics
from cm3leon_jax.evaluation.protocols.column import ColumnSamples, mean, present

BLEU_RESAMPLES = 1000


def cider(column: ColumnSamples) -> dict:
  """Computes CIDEr-D times 100. The references of all examples determine the n-gram weights."""
  captions, references = _tokens(column)
  return mean((100 * caption_metrics.cider(captions, references)).tolist(), column)


def bleu4(column: ColumnSamples) -> dict:
  """Computes BLEU-4 times 100, with all captions as one corpus. Its interval resamples groups."""
  counts = caption_metrics.bleu_counts(*_tokens(column))
  _, places = np.unique(np.asarray(column.groups), return_inverse=True)
  of_groups = np.zeros((places.max() + 1, counts.shape[1]))
  np.add.at(of_groups, places, counts)
  result: dict[str, Any] = {
    "value": 100 * float(caption_metrics.bleu(counts.sum(0))[-1]),
    "low": None,
    "high": None,
    "samples": len(counts),
  }
  if (size := len(of_groups)) > 1:
    rng = np.random.default_rng(column.seed)
    drawn = rng.multinomial(size, np.full(size, 1 / size), BLEU_RESAMPLES) @ of_groups
    resamples = 100 * caption_metrics.bleu(drawn)[:, -1]
    effective = intervals.effective_number(np.bincount(places))
    low, high = intervals.percentiles(resamples, effective)
    result |= {"low": low, "high": high, "resamples": resamples}
  return result


def vqa_accuracy(column: ColumnSamples) -> dict:
  """Computes the VQA accuracy, times 100."""
  return mean((100 * answers.vqa_accuracies(*_texts(column))).tolist(), column)


def exact_match(column: ColumnSamples) -> dict:
  """Computes the percentage of texts that equal a reference; both are normalized first."""
  return mean((100 * answers.exact_matches(*_texts(column))).tolist(), column)


def ndcg(column: ColumnSamples) -> dict:
  """Computes NDCG times 100, with the candidates ranked by their log-probabilities."""
  pairs = zip(present(column.candidates), column.examples)
  values = [answers.ndcg([scores], [example.relevance])[0] for scores, example in pairs]
  return mean([100 * float(value) for value in values], column)


def _texts(column: ColumnSamples) -> tuple[list[str], list[Sequence[str]]]:
  texts = [line["text"] for line in column.lines]
  return texts, [example.references for example in column.examples]


def _tokens(column: ColumnSamples) -> tuple[list, list]:
  texts, references = _texts(column)
  tokens = [[ptb.tokenize(text) for text in of_example] for of_example in references]
  return [ptb.tokenize(text) for text in texts], tokens
