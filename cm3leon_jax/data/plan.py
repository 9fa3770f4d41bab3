"""What each row of training holds, as a pure function of (seed, row), from lengths and candidates alone."""

# L slots of a row: a sample of T tokens takes T - 1, one for each token that it predicts.

import bisect
import dataclasses
import threading
import typing

import grain
import numpy as np

from cm3leon_jax.data import cm3
from cm3leon_jax.data.documents import DocumentStore


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """How documents become rows. Defaults are the tutorial's where it differs from the paper.

  Attributes:
    sequence_length: slots of a row.
    num_neighbors: K, retrieved documents before each document with an image (paper: 3).
    neighbor_dropout: share of samples that get no neighbours, so that the model also works without a bank.
    condition_dropout: share of the remaining samples with an image whose caption and neighbours give way to one
      sentinel: what the unconditional stream of guidance sees (tutorial: 10%; the paper drops nothing).
    mean_spans: lambda of the Poisson distribution of the number of spans; 0 trains plain causal prediction.
    whole_segment_rate: probability that a sample's spans are whole segments.
    neighbor_loss_weight: weight of the loss on neighbours (CM3Leon 1, RA-CM3 0.1).
    text_share: share of slots that text-only documents get.
    pack_window: samples that are packed together, best fit; bounds the planner's memory.
    read_threads: threads that prefetch batches.
  """

  sequence_length: int = 4_096
  num_neighbors: int = 2
  neighbor_dropout: float = 0.1
  condition_dropout: float = 0.1
  mean_spans: float = 1.0
  whole_segment_rate: float = 0.5
  neighbor_loss_weight: float = 1.0
  text_share: float = 0.7
  pack_window: int = 65_536
  read_threads: int = 2

  def __post_init__(self):
    for field in ("sequence_length", "pack_window", "read_threads"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field} is {getattr(self, field)}; it must be positive.")
    for field in ("neighbor_dropout", "condition_dropout", "whole_segment_rate", "text_share"):
      if not 0 <= getattr(self, field) <= 1:
        raise ValueError(f"{field} is {getattr(self, field)}; it must lie in [0, 1].")
    for field in ("num_neighbors", "mean_spans", "neighbor_loss_weight"):
      if getattr(self, field) < 0:
        raise ValueError(f"{field} is {getattr(self, field)}; it must not be negative.")

  def without_augmentation(self) -> "DataConfig":
    """The same rows with every document causal and whole: no spans, no dropout. For held-out losses."""
    return dataclasses.replace(self, neighbor_dropout=0.0, condition_dropout=0.0, mean_spans=0.0)


class SamplePlan(typing.NamedTuple):
  """What becomes of one document.

  Attributes:
    neighbors: places in the document's candidates, in the order in which they stand before it.
    dropped: caption and neighbours give way to `<mask:0>`.
    spans: CM3 spans, half-open ranges of the joined sample.
    length: tokens of the transformed sample.
  """

  neighbors: tuple[int, ...]
  dropped: bool
  spans: tuple[tuple[int, int], ...]
  length: int


def joined_length(segment_lengths) -> int:
  """Tokens of `</s> segment <break> ... segment </s>`."""
  return int(sum(segment_lengths)) + len(segment_lengths) + 1


def plan_sample(lengths, is_image, candidates, rng: np.random.Generator, config: DataConfig, max_spans: int) -> SamplePlan:
  """Draws all that decides a sample's length; planner and loader both call it with the same generator.

  Args:
    lengths: segment lengths of the document.
    is_image: their kinds.
    candidates: segment lengths of each of its candidate neighbours.
    rng: the sample's own generator, fresh.
    config: rates and the row length.
    max_spans: sentinels that the vocabulary has.

  Returns:
    A plan whose length is at most config.sequence_length + 1. What does not fit goes in this order: whole neighbours,
    then spans, then the document's own tail.
  """
  limit = config.sequence_length + 1
  has_image = bool(np.any(is_image))
  neighbors: list[int] = []
  if has_image and rng.random() >= config.neighbor_dropout:
    neighbors = rng.permutation(len(candidates))[: config.num_neighbors].tolist()
    if rng.random() < config.condition_dropout and is_image[-1]:
      return SamplePlan((), True, (), min(int(lengths[-1]) + 4, limit))
  num_spans = min(int(rng.poisson(config.mean_spans)), max_spans)
  whole_segments = bool(rng.random() < config.whole_segment_rate)
  joined = lambda: [n for i in neighbors for n in candidates[i]] + list(lengths)
  while neighbors and joined_length(joined()) + cm3.OVERHEAD * num_spans > limit:
    neighbors.pop(0)
  room = limit - joined_length(joined())
  num_spans = max(0, min(num_spans, room // cm3.OVERHEAD))
  spans = cm3.draw_spans(joined(), num_spans, whole_segments, rng) if num_spans else ()
  return SamplePlan(tuple(neighbors), False, spans, min(joined_length(joined()) + cm3.OVERHEAD * len(spans), limit))


class Placement(typing.NamedTuple):
  """One sample of a row: unit `unit` of pass `pass_` over source `source`, `slots` of the row."""

  source: int
  pass_: int
  unit: int
  slots: int


@dataclasses.dataclass
class Source:
  """Documents that share a place in the mixture.

  Attributes:
    store: the documents.
    share: share of all slots; shares of a mixture sum to 1.
    neighbors: [n, C] int32, candidates of each document as indices into `bank`, -1 for none; or None.
    bank: store that neighbours are read from.
  """

  store: DocumentStore
  share: float
  neighbors: np.ndarray | None = None
  bank: DocumentStore | None = None

  def candidates(self, document: int) -> np.ndarray:
    if self.neighbors is None:
      return np.zeros(0, np.int32)
    ids = self.neighbors[document]
    return ids[ids >= 0]


class Units:
  """The units that a pass over a source visits: documents, and the pieces that long text-only ones are cut into."""

  def __init__(self, store: DocumentStore, sequence_length: int):
    self._piece = sequence_length - 1  # With </s> at both ends a piece fills the row.
    pieces = np.ones(len(store), np.int64)
    for i in range(len(store)):
      lengths, is_image = store.segment_lengths(i)
      if len(lengths) == 1 and not is_image[0]:
        pieces[i] = -(-int(lengths[0]) // self._piece)
    self._ends = np.cumsum(pieces)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def locate(self, unit: int) -> tuple[int, int]:
    """Unit -> (document, first token of the piece within its only segment; 0 for a whole document)."""
    document = int(np.searchsorted(self._ends, unit, side="right"))
    first = int(self._ends[document - 1]) if document else 0
    return document, (unit - first) * self._piece

  def lengths(self, store: DocumentStore, unit: int):
    """Segment lengths and kinds of the unit."""
    document, start = self.locate(unit)
    lengths, is_image = store.segment_lengths(document)
    if len(lengths) == 1 and not is_image[0]:
      lengths = np.minimum(lengths - start, self._piece)
    return lengths, is_image


def pack_best_fit(slots, capacity: int) -> list[list[int]]:
  """Best-fit decreasing: each sample, longest first, goes to the fullest row that has room for it.

  >>> pack_best_fit([3, 6, 4, 2], 8)
  [[1, 3], [2, 0]]
  """
  rows: list[list[int]] = []
  open_rows: list[tuple[int, int]] = []  # (free slots, row), ascending
  for i in sorted(range(len(slots)), key=lambda i: (-slots[i], i)):
    at = bisect.bisect_left(open_rows, (slots[i], -1))
    if at == len(open_rows):
      free, row = capacity, len(rows)
      rows.append([])
    else:
      free, row = open_rows.pop(at)
    rows[row].append(i)
    if free > slots[i]:
      bisect.insort(open_rows, (free - slots[i], row))
  return rows


class RowPlan:
  """Row -> placements, for any row: windows of samples are drawn by share of slots, packed best fit and shuffled.

  Windows follow from one another, so row i costs the planning of the windows before it once; only the newest few are
  kept. Thread-safe.
  """

  def __init__(self, sources: list[Source], config: DataConfig, max_spans: int, seed: int):
    """Raises ValueError if a source with a share has no documents."""
    for i, source in enumerate(sources):
      if source.share > 0 and not len(source.store):
        raise ValueError(f"source {i} ({source.store.folder}) has a share of {source.share} and no documents.")
    self.sources, self.config, self.max_spans, self.seed = sources, config, max_spans, seed
    self.units = [Units(s.store, config.sequence_length) for s in sources]
    self._shares = np.array([s.share for s in sources], np.float64)
    zeros = np.zeros(len(sources), np.int64)
    self._starts = [(0, zeros, zeros)]  # per window: first row, units taken so far, slots taken so far
    self._windows: dict[int, list[list[Placement]]] = {}
    self._orders: dict[tuple[int, int], typing.Any] = {}
    self._lock = threading.Lock()

  def row(self, i: int) -> list[Placement]:
    """The samples of row `i` (>= 0), in order."""
    with self._lock:
      while self._starts[-1][0] <= i:
        self._plan_window(len(self._starts) - 1)
      window = bisect.bisect_right(self._starts, i, key=lambda s: s[0]) - 1
      if window not in self._windows:
        self._plan_window(window)
      return self._windows[window][i - self._starts[window][0]]

  def plan(self, source: int, pass_: int, unit: int) -> SamplePlan:
    """What becomes of one unit in one pass."""
    document, _ = self.units[source].locate(unit)
    spec = self.sources[source]
    lengths, is_image = self.units[source].lengths(spec.store, unit)
    candidates = [spec.bank.segment_lengths(j)[0] for j in spec.candidates(document)]
    rng = np.random.default_rng((self.seed, source, pass_, unit))
    return plan_sample(lengths, is_image, candidates, rng, self.config, self.max_spans)

  def _unit_at(self, source: int, position: int) -> tuple[int, int]:
    pass_, offset = divmod(position, len(self.units[source]))
    if (source, pass_) not in self._orders:
      seed = int(np.random.default_rng((self.seed, source, pass_)).integers(2**31))
      self._orders[source, pass_] = grain.MapDataset.range(len(self.units[source])).shuffle(seed=seed)
    return pass_, int(self._orders[source, pass_][offset])

  def _plan_window(self, window: int) -> None:
    first, taken, used = (x.copy() if isinstance(x, np.ndarray) else x for x in self._starts[window])
    samples = []
    active = np.flatnonzero(self._shares > 0)
    for _ in range(self.config.pack_window):
      source = int(active[np.argmin(used[active] / self._shares[active])])
      pass_, unit = self._unit_at(source, int(taken[source]))
      slots = self.plan(source, pass_, unit).length - 1
      samples.append(Placement(source, pass_, unit, slots))
      taken[source] += 1
      used[source] += slots
    rows = pack_best_fit([s.slots for s in samples], self.config.sequence_length)
    order = np.random.default_rng((self.seed, window)).permutation(len(rows))
    self._windows[window] = [[samples[i] for i in rows[r]] for r in order]
    if window == len(self._starts) - 1:
      self._starts.append((first + len(rows), taken, used))
    while len(self._windows) > 4:
      del self._windows[next(iter(self._windows))]
