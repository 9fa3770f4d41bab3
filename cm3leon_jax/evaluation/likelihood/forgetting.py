"""Measures what a tuned model has forgotten of its base: bits and judged images, before and after.

Both models get the same held-out documents of the base, so all differences are paired.
"""

# n documents.

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.documents.store import Bank, DocumentStore
from cm3leon_jax.evaluation import intervals, judged
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.retrieval import neighbors
from cm3leon_jax.run.base_documents import Base
from cm3leon_jax.run.run import Run

CAPTIONS = 120  # Largest number of held-out captions whose images are judged.


@dataclasses.dataclass(frozen=True)
class Measured:
  """Results of one model on the held-out documents of a base.

  Attributes:
    bits: for each modality, the sum of bits of each document, [n] float64.
    tokens: for each modality, the number of tokens of each document, [n] int64.
    concepts: concepts of the n documents.
    correct: for each judged caption, whether its image is correct; () without a judge.
    captions: concepts of the judged captions.
  """

  bits: dict[str, np.ndarray]
  tokens: dict[str, np.ndarray]
  concepts: list[str]
  correct: Sequence[bool] = ()
  captions: Sequence[str] = ()


def measure(run: Run, params: dict, base: Base, judge: judged.Judge | None = None) -> Measured:
  """Measures a model on held-out documents of `base`, each after its neighbors.

  Args:
    run: the tuned run, whose tokenizers also the base has.
    params: parameters of the base or of the tuned model, on the current mesh (`jax.set_mesh`).
    judge: judges images that the model generates for captions with facts; None: only bits are
      measured.
  """
  settings, documents = run.settings, base.folder / "documents"
  vocab, config = settings.vocab, settings.evaluation
  bank = Bank(documents, vocab)
  store = DocumentStore(documents / "heldout_pairs", vocab)
  ids = neighbors.load_neighbors(base.folder / "neighbors", "heldout_pairs", True, bank=len(bank))
  pairs, concepts, samples, _ = bits.heldout_samples(
    store, bank, ids, config.num_documents, settings.data, vocab, settings.seed
  )
  true = samples["true"]
  scored = bits.score_samples(params, settings.model, true, vocab, config.batch_size)
  masks = [bits.own_targets(sample, pair, vocab) for sample, pair in zip(true, pairs)]
  sums, tokens = {}, {}
  for modality in bits.MODALITIES:
    own = [mask[modality] for mask in masks]
    sums[modality] = np.array([row[mask].sum() for row, mask in zip(scored, own)])
    tokens[modality] = np.array([mask.sum() for mask in own])
  known = sum(bool(store[i].facts) for i in range(len(store))) if judge else 0
  verdicts = _judge(judge, run, params, base, min(CAPTIONS, known)) if judge and known else ((), ())
  return Measured(sums, tokens, concepts, *verdicts)


def _judge(
  judge: judged.Judge, run: Run, params: dict, base: Base, count: int
) -> tuple[Sequence[bool], Sequence[str]]:
  """Generates and judges images for held-out captions. Returns the verdicts and the concepts."""
  config = dataclasses.replace(base.settings.evaluation, captions=count)
  settings: Settings = dataclasses.replace(
    run.settings, evaluation=config, sampling=base.settings.sampling
  )
  run = dataclasses.replace(run, settings=settings)
  pipeline = Pipeline.load(run, params, None, base.folder, batch_size=config.batch_size)
  tasks = judged.heldout_captions(pipeline, base.folder, [settings.sampling.guidance])
  images = [sample.segments[0] for [sample] in pipeline.generate(tasks)]
  wrong = judged.judge_all(judge, images, [task.document.facts for task in tasks])
  return [not reason for reason in wrong], [task.concept for task in tasks]


def compare(before: Measured, after: Measured) -> dict[str, Any]:
  """Compares the tuned model (`after`) with its base (`before`) on the same documents.

  Returns:
    For each modality with tokens, {"before", "after": bits per token, "rise", "low", "high": rise
    as a share of `before`, with a 95% interval over concepts}. With judged captions, also
    "correct": {"before", "after": shares, "change", "low", "high": difference of the shares}.
  """
  result: dict[str, Any] = {}
  for modality, sums in before.bits.items():
    tokens = before.tokens[modality]
    used = tokens > 0
    if not used.any():
      continue
    groups = [c for c, u in zip(before.concepts, used) if u]
    old, new = sums[used], after.bits[modality][used]
    rise = intervals.mean_interval(new - old, old, groups)
    per_token = {"before": old.sum() / tokens.sum(), "after": new.sum() / tokens.sum()}
    result[modality] = {
      **per_token, "rise": rise["mean"], "low": rise["low"], "high": rise["high"],
      "documents": int(used.sum()),
    }  # fmt: skip
  if len(before.correct):
    old, new = (np.array(m.correct, np.float64) for m in (before, after))
    change = intervals.mean_interval(new - old, np.ones(len(old)), before.captions)
    result["correct"] = {
      "before": old.mean(), "after": new.mean(), "change": change["mean"], "low": change["low"],
      "high": change["high"], "captions": len(old),
    }  # fmt: skip
  return result


def describe(result: dict[str, Any], source: str) -> list[str]:
  """Formats the result of `compare` as sentences about the base `source`."""
  lines = []
  for modality, unit in (("image", "image code"), ("text", "text token")):
    if found := result.get(modality):
      lines.append(
        f"forgetting: {found['documents']} held-out documents of {source}: bits per {unit} "
        f"{found['before']:.3f} -> {found['after']:.3f}, {found['rise']:+.1%}"
        f"{_range(found, '+.1%')}."
      )
  if found := result.get("correct"):
    lines.append(
      f"forgetting: {found['captions']} held-out captions of {source}: {found['before']:.1%} of "
      f"images correct -> {found['after']:.1%}, {100 * found['change']:+.1f} points"
      f"{_range(found, '+.1f', 100)}."
    )
  return lines


def _range(found: dict[str, Any], form: str, factor: float = 1) -> str:
  if found["low"] is None:
    return ""
  low, high = (format(factor * found[name], form) for name in ("low", "high"))
  return f" (95% interval {low} to {high})"
