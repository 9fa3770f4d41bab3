"""Computes statistics of a row plan: shares of sources, losses, neighbors, drops, spans."""

import collections
from collections.abc import Sequence
import itertools
from typing import Any

import numpy as np

from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.documents.store import Bank, DocumentStore
from cm3leon_jax.data.rows.plan import RowPlan, RowSource

TYPICAL = 1_024  # The typical length of a store is the median over this many documents.


def plan_statistics(plan: RowPlan, windows: int = 1) -> dict:
  """Summarizes the first `windows` windows of a plan. Reads lengths, but no tokens.

  Returns:
    windows, rows, samples: number of each.
    fill: share of positions that contain tokens of samples.
    source_shares: share of each source in the filled positions.
    samples_per_row, spans_per_sample: mean numbers.
    The remaining values cover only samples of sources with neighbors.
    neighbors_per_sample: mean number.
    too_few_candidates: share of samples whose documents have too few candidates.
    neighbors_crowded_out: share of the picked neighbors that did not fit.
    condition_drops: share of samples whose caption and neighbors were dropped.
  """
  counts: collections.Counter[str] = collections.Counter()
  filled, rows = np.zeros(len(plan.sources), np.int64), 0
  for window in range(windows):
    for row in plan.window(window):
      rows += 1
      for source, pass_, unit, used in row:
        filled[source] += used
        sample = plan.plan(source, pass_, unit)
        counts.update(samples=1, spans=len(sample.spans))
        if plan.sources[source].neighbors is not None:
          counts.update(retrieving=1, neighbors=len(sample.neighbors), dropped=sample.dropped)
          counts.update(too_few=sample.missing > 0, crowded_out=sample.crowded_out)

  def share(name: str, *of: str) -> float:
    return counts[name] / max(sum(counts[x] for x in of), 1)

  return {
    "windows": windows,
    "rows": rows,
    "samples": counts["samples"],
    "fill": float(filled.sum() / (rows * plan.config.sequence_length)),
    "source_shares": (filled / filled.sum()).tolist(),
    "samples_per_row": counts["samples"] / rows,
    "spans_per_sample": share("spans", "samples"),
    "neighbors_per_sample": share("neighbors", "retrieving"),
    "too_few_candidates": share("too_few", "retrieving"),
    "neighbors_crowded_out": share("crowded_out", "neighbors", "crowded_out"),
    "condition_drops": share("dropped", "retrieving"),
  }


def describe(statistics: dict, names: Sequence[str] = ()) -> str:
  """Formats the result of `plan_statistics` as one line. `names` are optional source names."""
  shares = " / ".join(
    f"{share:.0%} {name}".rstrip()
    for share, name in itertools.zip_longest(statistics["source_shares"], names, fillvalue="")
  )
  return (
    "{samples:,} samples in {rows:,} rows, {fill:.1%} of positions filled, {shares} by source; "
    "{samples_per_row:.1f} samples per row, {spans_per_sample:.2f} spans per sample; samples with "
    "retrieval: {neighbors_per_sample:.2f} neighbors per sample, {too_few_candidates:.1%} with too "
    "few candidates, {neighbors_crowded_out:.1%} of the neighbors did not fit, "
    "{condition_drops:.1%} without caption and neighbors."
  ).format(shares=shares, **statistics)


def loss_statistics(plan: RowPlan, windows: int = 1) -> dict[str, Any]:
  """Counts which positions of each source have a loss. Reads lengths, but no tokens.

    source 0: 10 positions, 2 of them with the weight 5; source 1: 30 positions, all of weight 1
    target_shares = [0.2, 1.0], loss_shares = [0.25, 0.75]; in 2 rows: weight_per_row = 20

  Returns:
    target_shares: share of the positions of each source that have a loss weight above 0.
    loss_shares: share of each source in the sum of all loss weights.
    weight_per_row: mean sum of the loss weights of a row.
  """
  count = len(plan.sources)
  rows, filled, targets, loss = 0, np.zeros(count), np.zeros(count), np.zeros(count)
  for window in range(windows):
    planned = plan.window(window)
    rows += len(planned)
    for source, pass_, unit, used in itertools.chain.from_iterable(planned):
      weights = plan.loss_weights(source, pass_, unit)
      filled[source] += used
      targets[source] += np.count_nonzero(weights)
      loss[source] += weights.sum(dtype=np.float64)
  return {
    "target_shares": (targets / np.maximum(filled, 1)).tolist(),
    "loss_shares": (loss / max(loss.sum(), 1e-9)).tolist(),
    "weight_per_row": float(loss.sum() / rows),
  }


def describe_loss(statistics: dict, names: Sequence[str]) -> str:
  """Formats `source_shares` and the result of `loss_statistics` as a table of named sources."""
  columns = [statistics[name] for name in ("source_shares", "target_shares", "loss_shares")]
  width = max(len("source"), *map(len, names))
  lines = [f"{'source':<{width}}  positions  with a loss  loss weight"]
  for name, positions, targets, loss in zip(names, *columns, strict=True):
    lines.append(f"{name:<{width}}  {positions:>9.1%}  {targets:>11.1%}  {loss:>11.1%}")
  return "\n".join(lines)


def typical_length(store: Bank | DocumentStore) -> int:
  """Computes the median number of positions of at most 1,024 evenly spaced documents."""
  chosen = np.linspace(0, len(store) - 1, min(len(store), TYPICAL)).astype(np.int64)
  lengths = [store.segment_lengths(int(i))[0] for i in chosen]
  return int(np.median([int(x.sum()) + len(x) for x in lengths]))


def space_for_neighbors(source: RowSource, config: DataConfig) -> str:
  """Returns a warning if a typical document and K neighbors do not fit into a row, else ""."""
  assert source.bank is not None
  document, neighbor = typical_length(source.store), typical_length(source.bank)
  fitting = max(0, (config.sequence_length - document) // neighbor)
  if fitting >= config.num_neighbors:
    return ""
  return (
    f"{config.num_neighbors} neighbors of typically {neighbor:,} tokens and a document of "
    f"{document:,} do not fit into {config.sequence_length:,} positions: only {fitting} neighbors "
    "fit, and rows omit the others."
  )
