"""What a row plan makes of its data, counted: fill, shares, neighbors, drops, spans."""

import collections

import numpy as np

from cm3leon_jax.data.documents import DocumentStore
from cm3leon_jax.data.plan import DataConfig, RowPlan, Source

TYPICAL = 1_024  # Documents, evenly spaced, whose median length is a store's typical one.


def plan_statistics(plan: RowPlan, windows: int = 1) -> dict:
  """Counts the first windows of a plan; nothing is read but lengths.

  Args:
    plan: of any config.
    windows: how many of its first windows are counted.

  Returns:
    windows, rows, samples; fill, the share of slots that hold samples; source_shares, each source's share of those; and
    samples_per_row, spans_per_sample. Of the samples of sources with neighbors: neighbors_per_sample; too_few_candidates, the
    share that got fewer than K because fewer were kept; neighbors_crowded_out, the share of the neighbors drawn that went for
    want of room; condition_drops, the share whose conditioning gave way.
  """
  counts, slots, rows = collections.Counter(), np.zeros(len(plan.sources), np.int64), 0
  for window in range(windows):
    for row in plan.window(window):
      rows += 1
      for source, pass_, unit, used in row:
        slots[source] += used
        sample = plan.plan(source, pass_, unit)
        counts.update(samples=1, spans=len(sample.spans))
        if plan.sources[source].neighbors is not None:
          counts.update(retrieving=1, neighbors=len(sample.neighbors), dropped=sample.dropped)
          counts.update(too_few=sample.missing > 0, crowded_out=sample.crowded_out)
  share = lambda name, *of: counts[name] / max(sum(counts[x] for x in of), 1)
  return {
    "windows": windows,
    "rows": rows,
    "samples": counts["samples"],
    "fill": float(slots.sum() / (rows * plan.config.sequence_length)),
    "source_shares": (slots / slots.sum()).tolist(),
    "samples_per_row": counts["samples"] / rows,
    "spans_per_sample": share("spans", "samples"),
    "neighbors_per_sample": share("neighbors", "retrieving"),
    "too_few_candidates": share("too_few", "retrieving"),
    "neighbors_crowded_out": share("crowded_out", "neighbors", "crowded_out"),
    "condition_drops": share("dropped", "retrieving"),
  }


def describe(statistics: dict) -> str:
  """One line of what `plan_statistics` found."""
  shares = " / ".join(f"{share:.0%}" for share in statistics["source_shares"])
  return (
    "{samples:,} samples in {rows:,} rows, {fill:.1%} of slots filled, {shares} by source; {samples_per_row:.1f} samples a "
    "row, {spans_per_sample:.2f} spans each; with retrieval {neighbors_per_sample:.2f} neighbors each, "
    "{too_few_candidates:.1%} had too few candidates, {neighbors_crowded_out:.1%} of the neighbors no room, "
    "{condition_drops:.1%} dropped their conditioning."
  ).format(shares=shares, **statistics)


def typical_length(store: DocumentStore) -> int:
  """Median slots of a document, each segment with its `<break>` or `</s>`, of up to 1,024 evenly spaced ones."""
  chosen = np.linspace(0, len(store) - 1, min(len(store), TYPICAL)).astype(np.int64)
  lengths = [store.segment_lengths(int(i))[0] for i in chosen]
  return int(np.median([int(x.sum()) + len(x) for x in lengths]))


def room_for_neighbors(source: Source, config: DataConfig) -> str:
  """A sentence where K neighbors of typical length do not fit a row beside a typical document, else ""."""
  document, neighbor = typical_length(source.store), typical_length(source.bank)
  fitting = max(0, (config.sequence_length - document) // neighbor)
  if fitting >= config.num_neighbors:
    return ""
  return (
    f"{config.num_neighbors} neighbors of typically {neighbor:,} tokens and a document of {document:,} never fit "
    f"{config.sequence_length:,} slots: whole neighbors are left out, so that {fitting} remain."
  )
