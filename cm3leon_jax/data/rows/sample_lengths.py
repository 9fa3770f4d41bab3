"""Computes the lengths of many samples at once.

`sample_plan.plan_sample` defines the length of a sample. Here, arrays replace its branches and
loops, and each sample draws the same random numbers in the same order, up to the last one that
changes its length.
"""

# n samples, C candidates, K neighbors, P documents of these samples, S segments.

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.config.data import PAPER_CANDIDATES, DataConfig
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.data.rows.random_streams import RandomStreams
from cm3leon_jax.vocab import VocabLayout


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Joins ranges: [3, 8] and [2, 3] become [3 4 8 9 10]."""
  ends = np.cumsum(counts)
  return np.arange(counts.sum()) + np.repeat(starts - ends + counts, counts)


class Segments(NamedTuple):
  """The segments of P documents, one document after another.

  Attributes:
    lengths: [S] int64, number of tokens.
    is_image: [S] int64, 1 or 0.
    counts: [P] int64, number of segments of each document, at least 1.
  """

  lengths: np.ndarray
  is_image: np.ndarray
  counts: np.ndarray

  @property
  def starts(self) -> np.ndarray:
    """Returns the index of the first segment of each document, [P]."""
    return np.cumsum(self.counts) - self.counts

  def take(self, documents: np.ndarray) -> "Segments":
    """Returns the segments of some of the documents, in this order."""
    counts = self.counts[documents]
    at = ranges(self.starts[documents], counts)
    return Segments(self.lengths[at], self.is_image[at], counts)


def read_segments(parts: Sequence[DocumentStore], documents: np.ndarray) -> Segments:
  """Reads the segments of documents [P] of stores that follow each other, as in a `Bank`."""
  counts = np.zeros(len(documents), np.int64)
  found, first = [], 0
  for store in parts:
    chosen = np.flatnonzero((documents >= first) & (documents < first + len(store)))
    begin = store.offsets[documents[chosen] - first]
    counts[chosen] = store.offsets[documents[chosen] - first + 1] - begin
    found.append((store, chosen, begin))
    first += len(store)
  starts = np.cumsum(counts) - counts
  lengths, is_image = np.zeros((2, counts.sum()), np.int64)
  for store, chosen, begin in found:
    to, at = ranges(starts[chosen], counts[chosen]), ranges(begin, counts[chosen])
    lengths[to], is_image[to] = store.lengths[at], store.is_image[at]
  return Segments(lengths, is_image, counts)


class Samples:
  """Documents with their neighbors, joined by the template.

  The parts of sample i are the documents `parts[i]` of `segments`: its neighbors, then the document
  itself. `join` leaves out the last neighbors.
  """

  def __init__(self, segments: Segments, parts: np.ndarray, vocab: VocabLayout):
    """Takes the segments of P documents, and the parts of n samples, [n, K + 1]."""
    self._segments, self._parts = segments, parts
    self._gaps = np.zeros((templates.START + 1, templates.WRITTEN + 1), np.int64)
    for kinds, ids in templates.of(vocab).between.items():
      self._gaps[kinds] = len(ids)

  def join(self, rows: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins the samples `rows` [m] with their first `kept` [m] neighbors.

    Returns the half-open ranges of all segments, [S, 2], the number of segments of each sample, and
    the number of tokens of each sample.
    """
    width = self._parts.shape[1]
    has = np.arange(width) < kept[:, None]
    has[:, -1] = True
    joined = self._segments.take(self._parts[rows][has])
    counts = np.add.reduceat(joined.counts, np.cumsum(kept + 1) - kept - 1)
    first = np.cumsum(counts) - counts
    before = np.roll(joined.is_image, 1)
    before[first] = templates.START
    stops = np.cumsum(self._gaps[before, joined.is_image] + joined.lengths)
    last = first + counts - 1
    ends = stops[last]  # Counted from the first sample.
    stops = stops - np.repeat(np.concatenate([[0], ends[:-1]]), counts)
    total = stops[last] + self._gaps[joined.is_image[last], templates.END]
    return np.stack([stops - joined.lengths, stops], axis=1), counts, total


def sample_lengths(
  documents: Segments,
  candidates: np.ndarray,
  bank: Sequence[DocumentStore],
  streams: RandomStreams,
  config: DataConfig,
  vocab: VocabLayout,
) -> np.ndarray:
  """Computes the lengths of samples, [n] int64, as `plan_sample` does.

  Args:
    documents: segments of the documents of n samples.
    candidates: [n, C], indices into `bank`, padded with -1.
    streams: random sequences from which no number was drawn. `config.mean_spans` is below
      `random_streams.MAX_MEAN`.
  """
  n, limit = len(documents.counts), config.sequence_length + 1
  retrieving, order, picked = _pick(documents, (candidates >= 0).sum(axis=1), streams, config)
  stable = np.argsort(candidates < 0, axis=1, kind="stable")
  chosen = np.take_along_axis(np.take_along_axis(candidates, stable, axis=1), order, axis=1)
  has = np.arange(order.shape[1]) < picked[:, None]
  parts = np.zeros((n, order.shape[1] + 1), np.int64)
  parts[:, :-1][has] = n + np.arange(has.sum())
  parts[:, -1] = np.arange(n)
  neighbors = read_segments(bank, chosen[has])
  pool = Segments(*(np.concatenate(x) for x in zip(documents, neighbors)))
  samples, last = Samples(pool, parts, vocab), documents.starts + documents.counts - 1
  dropped = np.zeros(n, bool)
  dropped[retrieving] = streams.random(retrieving) < config.condition_dropout
  dropped &= documents.is_image[last] > 0
  image = documents.lengths[last]
  lengths = np.minimum(templates.of(vocab).dropped_length(0) + image, limit)
  rows = np.flatnonzero(~dropped)
  if len(rows):
    lengths[rows] = _masked_lengths(samples, rows, picked[rows], streams, config, vocab)
  return lengths


def _pick(
  documents: Segments, counts: np.ndarray, streams: RandomStreams, config: DataConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Picks neighbors as `pick_neighbors` does, from `counts` candidates of each sample.

  Returns the samples that do not lose their neighbors, the picked candidates of all samples in the
  order of the row, [n, at most K], and the number of picked candidates of each sample.
  """
  rows = np.flatnonzero(np.add.reduceat(documents.is_image, documents.starts))
  rows = rows[streams.random(rows) >= config.neighbor_dropout]
  if config.neighbor_sampling == "paper":
    counts = np.minimum(counts, PAPER_CANDIDATES)
  wanted = np.full(len(rows), config.num_neighbors)
  if config.neighbor_sampling == "uniform":
    wanted = streams.integers(rows, config.num_neighbors)
  width = int(counts.max(initial=0))
  order = np.tile(np.arange(width), (len(counts), 1))
  if config.neighbor_sampling != "best":
    order[rows] = streams.permutations(rows, counts[rows], width)
  picked = np.zeros(len(counts), np.int64)
  picked[rows] = np.minimum(wanted, counts[rows])
  return rows, order[:, : config.num_neighbors], picked


def _masked_lengths(
  samples: Samples,
  rows: np.ndarray,
  kept: np.ndarray,
  streams: RandomStreams,
  config: DataConfig,
  vocab: VocabLayout,
) -> np.ndarray:
  """Returns the lengths of the samples `rows`, which have `kept` neighbors, with CM3 spans."""
  limit = config.sequence_length + 1
  wanted = np.minimum(streams.poisson(rows, config.mean_spans), vocab.num_masks)
  whole = streams.random(rows) < config.whole_segment_rate
  _, segments, total = samples.join(rows, kept)
  kept = kept.copy()
  while len(long := np.flatnonzero((kept > 0) & (total + cm3.OVERHEAD * wanted > limit))):
    kept[long] -= 1
    _, segments[long], total[long] = samples.join(rows[long], kept[long])
  wanted = np.clip((limit - total) // cm3.OVERHEAD, 0, wanted)
  spans = np.minimum(wanted, segments - 1)
  free = np.flatnonzero((wanted > 0) & ~(whole & (segments > 1)))
  if len(free):
    bounds, counts, _ = samples.join(rows[free], kept[free])
    spans[free] = _free_spans(bounds, counts, total[free], wanted[free], rows[free], streams)
  return np.minimum(total + cm3.OVERHEAD * spans, limit)


def _free_spans(
  bounds: np.ndarray,
  counts: np.ndarray,
  total: np.ndarray,
  wanted: np.ndarray,
  rows: np.ndarray,
  streams: RandomStreams,
) -> np.ndarray:
  """Counts the free spans that `cm3.sample_spans` would return for each of `rows`."""
  starts, found = np.cumsum(counts) - counts, np.zeros(len(rows), np.int64)
  context = np.add.reduceat(bounds[:, 1] - bounds[:, 0], starts)
  spans = np.zeros((len(rows), int(wanted.max()), 2), np.int64)
  for attempt in range(int(wanted.max()) ** 2):
    active = np.flatnonzero((found < wanted) & (attempt < wanted**2))
    if not len(active):
      break
    drawn = np.stack([streams.random(rows[active]) for _ in range(2)])
    points = np.sort((drawn * (total[active] + 1)).astype(np.int64), axis=0)
    at = ranges(starts[active], counts[active])
    owner, first = np.repeat(np.arange(len(active)), counts[active]), np.cumsum(counts[active])
    first -= counts[active]
    overlap = np.minimum(points[1][owner], bounds[at, 1]) - np.maximum(
      points[0][owner], bounds[at, 0]
    )
    size = np.maximum.reduceat(overlap, first)
    # Of segments with equal overlaps, the first one counts.
    best = np.where(overlap == size[owner], np.arange(len(at)), len(at))
    start = np.maximum(points[0], bounds[at[np.minimum.reduceat(best, first)], 0])
    stop, earlier = start + size, spans[active]
    apart = ~((start[:, None] < earlier[..., 1]) & (earlier[..., 0] < stop[:, None])).any(axis=1)
    good = np.flatnonzero(apart & (size > 0) & (size < context[active]))
    accepted = active[good]
    spans[accepted, found[accepted]] = np.stack([start[good], stop[good]], axis=1)
    context[accepted] -= size[good]
    found[accepted] += 1
  return found
