"""What each row of training holds, as a pure function of (seed, row), from lengths and candidates alone."""

# L slots of a row: a sample of T tokens takes T - 1, one for each token that it predicts.

import bisect
import collections
import dataclasses
import functools
import threading
import typing

from etils import epath
import grain
import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT
from cm3leon_jax.data import cm3
from cm3leon_jax.data.documents import DocumentStore
from cm3leon_jax.data.plan_starts import Start, WindowStarts, fingerprint

PAPER_NEIGHBORS, PAPER_CANDIDATES = 3, 4
SCAN = 2**22  # Lengths that are looked at in one go.


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class DataConfig:
  """How documents become rows. Defaults are the tutorial's where it differs from the paper."""

  sequence_length: typing.Annotated[int, Field(ge=2)] = 4_096
  """Slots of a row; at least 2, the slots of a one-token document."""
  num_neighbors: NonNegativeInt = 2
  """K, the number of retrieved documents before each document with an image (paper: 3)."""
  neighbor_sampling: typing.Literal["fixed", "paper", "uniform", "best"] = "fixed"
  """Choice among a document's candidates, in random order. `fixed`: any K; `paper`: three of the
  first four (CM3Leon, section 2.1), so K must be 3; `uniform`: any, their number uniform in {0,
  ..., K} (RA-CM3); `best`: the first K, best first, as at inference. Fewer where fewer
  candidates were kept."""
  neighbor_dropout: typing.Annotated[float, Field(ge=0, le=1)] = 0.1
  """Share of samples that get no neighbors, so that the model also works without a bank."""
  condition_dropout: typing.Annotated[float, Field(ge=0, le=1)] = 0.1
  """Share of the remaining samples with an image whose caption and neighbors are replaced by one
  sentinel, as in the unconditional stream of guidance (tutorial: 10%; the paper drops
  nothing)."""
  mean_spans: NonNegativeFloat = 1.0
  """Lambda of the Poisson distribution of the number of spans; 0: plain causal prediction."""
  whole_segment_rate: typing.Annotated[float, Field(ge=0, le=1)] = 0.5
  """Probability that the spans of a sample with several segments are whole segments."""
  neighbor_loss_weight: NonNegativeFloat = 1.0
  """Weight of the loss on neighbors (CM3Leon 1, RA-CM3 0.1)."""
  text_share: typing.Annotated[float, Field(ge=0, le=1)] = 0.7
  """Share of slots that text-only documents get."""
  interleaved_share: typing.Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of slots that documents of several texts and images get; pairs get the rest of the two
  shares."""
  pack_window: PositiveInt = 65_536
  """Number of samples that are packed together, best fit; it bounds the planner's memory."""
  read_threads: PositiveInt = 2
  """Number of threads that prefetch batches."""

  def __post_init__(self):
    if self.text_share + self.interleaved_share > 1:
      raise ValueError(
        f"text_share is {self.text_share} and interleaved_share {self.interleaved_share}; "
        "their sum must be at most 1."
      )
    if self.neighbor_sampling == "paper" and self.num_neighbors != PAPER_NEIGHBORS:
      raise ValueError(
        f"neighbor_sampling is 'paper', which draws {PAPER_NEIGHBORS} of {PAPER_CANDIDATES} "
        f"candidates, and num_neighbors is {self.num_neighbors}; "
        f"set num_neighbors={PAPER_NEIGHBORS}."
      )

  def for_heldout(self) -> "DataConfig":
    """Returns the config of the rows of the held-out loss.

    Every document is causal and whole, without spans and drops. Its best K neighbors stand before
    it and are not scored, for they are training documents.
    """
    return dataclasses.replace(
      self,
      neighbor_sampling="best",
      neighbor_dropout=0.0,
      condition_dropout=0.0,
      mean_spans=0.0,
      neighbor_loss_weight=0.0,
    )


class SamplePlan(typing.NamedTuple):
  """What becomes of one document.

  Attributes:
    neighbors: places in the document's candidates, in the order in which they stand before it.
    dropped: caption and neighbors give way to `<mask:0>`.
    spans: CM3 spans, half-open ranges of the joined sample.
    length: tokens of the transformed sample.
    missing: neighbors that were wanted and for which too few candidates were kept.
    crowded_out: neighbors that were drawn and went for want of room.
  """

  neighbors: tuple[int, ...]
  dropped: bool
  spans: tuple[tuple[int, int], ...]
  length: int
  missing: int = 0
  crowded_out: int = 0


def joined_length(segment_lengths) -> int:
  """Tokens of `</s> segment <break> ... segment </s>`."""
  return int(sum(segment_lengths)) + len(segment_lengths) + 1


def draw_neighbors(
  num_candidates: int, rng: np.random.Generator, config: DataConfig
) -> tuple[list[int], int]:
  """Returns the places of the candidates drawn, in row order, and how many more were wanted."""
  if config.neighbor_sampling == "paper":
    num_candidates = min(num_candidates, PAPER_CANDIDATES)
  wanted = config.num_neighbors
  if config.neighbor_sampling == "uniform":
    wanted = int(rng.integers(wanted + 1))
  if config.neighbor_sampling == "best":
    drawn = list(range(min(wanted, num_candidates)))
    return drawn, wanted - len(drawn)
  drawn = rng.permutation(num_candidates)[:wanted].tolist()
  return drawn, wanted - len(drawn)


def plan_sample(
  lengths, is_image, candidates, rng: np.random.Generator, config: DataConfig, max_spans: int
) -> SamplePlan:
  """Draws all that decides a sample's length; planner and loader both call it with the same generator.

  Args:
    lengths: segment lengths of the document.
    is_image: their kinds.
    candidates: segment lengths of each of its candidate neighbors.
    rng: the sample's own generator, fresh.
    config: rates and the row length.
    max_spans: sentinels that the vocabulary has.

  Returns:
    A plan whose length is at most config.sequence_length + 1. What does not fit goes in this order: whole neighbors,
    the last first, then spans, then the document's own tail.
  """
  limit = config.sequence_length + 1
  neighbors, missing = [], 0
  if any(is_image) and rng.random() >= config.neighbor_dropout:
    neighbors, missing = draw_neighbors(len(candidates), rng, config)
    if rng.random() < config.condition_dropout and is_image[-1]:
      return SamplePlan((), True, (), min(int(lengths[-1]) + 4, limit))
  num_spans = min(int(rng.poisson(config.mean_spans)), max_spans)
  whole_segments = rng.random() < config.whole_segment_rate
  drawn = len(neighbors)
  total = joined_length(lengths) + sum(joined_length(candidates[i]) - 1 for i in neighbors)
  while neighbors and total + cm3.OVERHEAD * num_spans > limit:
    total -= joined_length(candidates[neighbors.pop()]) - 1
  joined = [n for i in neighbors for n in candidates[i]] + list(lengths)
  num_spans = max(0, min(num_spans, (limit - total) // cm3.OVERHEAD))
  spans = cm3.draw_spans(joined, num_spans, whole_segments, rng) if num_spans else ()
  length = min(total + cm3.OVERHEAD * len(spans), limit)
  return SamplePlan(tuple(neighbors), False, spans, length, missing, drawn - len(neighbors))


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
    bank: store that neighbors are read from.
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


def long_texts(store: DocumentStore, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Documents of a single text that is longer than `most` tokens: their indices, ascending, and lengths, [n] int64 each."""
  offsets, lengths, is_image = (
    np.asarray(x) for x in (store.offsets, store.lengths, store.is_image)
  )
  found = [np.zeros(0, np.int64)]
  for start in range(0, len(lengths), SCAN):
    part = slice(start, start + SCAN)
    found.append(start + np.flatnonzero((lengths[part] > most) & ~is_image[part]))
  segments = np.concatenate(found)
  documents = np.searchsorted(offsets, segments, side="right") - 1
  alone = offsets[documents + 1] - offsets[documents] == 1
  return documents[alone], lengths[segments[alone]].astype(np.int64)


class Units:
  """The units that a pass over a source visits: documents, and the pieces that long text-only ones are cut into.

  Documents that are not cut take no memory.
  """

  def __init__(self, store: DocumentStore, sequence_length: int):
    self._piece = sequence_length - 1  # With </s> at both ends a piece fills the row.
    self._cut, lengths = long_texts(store, self._piece)
    self._pieces = -(-lengths // self._piece)
    more = np.cumsum(self._pieces - 1)
    self._first = self._cut + more - (self._pieces - 1)  # Unit of each cut document's first piece.
    self._count = len(store) + (int(more[-1]) if len(more) else 0)

  def __len__(self) -> int:
    return self._count

  def locate(self, unit: int) -> tuple[int, int]:
    """Unit -> (document, first token of the piece within its only segment; 0 for a whole document)."""
    at = int(self._first.searchsorted(unit, side="right")) - 1 if len(self._first) else -1
    if at < 0:
      return unit, 0
    piece, pieces = unit - int(self._first[at]), int(self._pieces[at])
    if piece < pieces:
      return int(self._cut[at]), piece * self._piece
    return int(self._cut[at]) + 1 + piece - pieces, 0

  def lengths(self, store: DocumentStore, unit: int) -> tuple[list[int], list[bool]]:
    """Segment lengths and kinds of the unit."""
    document, start = self.locate(unit)
    lengths, is_image = store.segment_lengths(document)
    lengths, is_image = lengths.tolist(), is_image.tolist()
    if len(lengths) == 1 and not is_image[0]:
      lengths = [min(lengths[0] - start, self._piece)]
    return lengths, is_image


class SampleGenerators(threading.local):
  """One generator per thread, moved to a sample's own stream of random numbers: ten times as fast as to make one."""

  def __init__(self):
    self._philox = np.random.Philox(0)
    self._generator = np.random.Generator(self._philox)
    self._state = self._philox.state

  def at(self, key: np.ndarray, unit: int) -> np.random.Generator:
    """The stream of `unit` under `key` ([2] uint64), from its start; valid until the next call in this thread.

    Philox is a function of key and counter (Salmon et al. 2011): streams whose counters differ in a high word never meet.
    """
    self._state["state"] = {"key": key, "counter": (0, 0, unit, 0)}
    self._philox.state = self._state
    return self._generator


def pass_seeds(seed: int, source: int, pass_: int) -> tuple[np.ndarray, int]:
  """Key of a pass's samples ([2] uint64) and seed of its order."""
  words = np.random.SeedSequence((seed, source, pass_)).generate_state(3, np.uint64)
  return words[:2], int(words[2]) % 2**32


def pack_best_fit(slots, capacity: int) -> list[list[int]]:
  """Best-fit decreasing: each sample, longest first, goes to a fullest row that has room for it.

  >>> pack_best_fit([3, 6, 4, 2], 8)
  [[1, 3], [2, 0]]
  """
  rows: list[list[int]] = []
  open_rows = collections.defaultdict(list)  # free slots -> rows that have so many
  sizes: list[int] = []  # its keys, ascending
  for i in sorted(range(len(slots)), key=lambda i: -slots[i]):
    at = bisect.bisect_left(sizes, slots[i])
    if at == len(sizes):
      row, free = [], capacity
      rows.append(row)
    else:
      free = sizes[at]
      row = open_rows[free].pop()
      if not open_rows[free]:
        del sizes[at], open_rows[free]
    row.append(i)
    free -= slots[i]
    if free:
      if free not in open_rows:
        bisect.insort(sizes, free)
      open_rows[free].append(row)
  return rows


class RowPlan:
  """Row -> placements, for any row: windows of samples are drawn by share of slots, packed best fit and shuffled.

  Windows follow from one another, so row i costs the planning of the windows before it once, in the life of a run if the
  places where windows start are kept in a file; only the newest few windows stay in memory. Thread-safe.
  """

  def __init__(
    self,
    sources: list[Source],
    config: DataConfig,
    max_spans: int,
    seed: int,
    starts_path: epath.PathLike | None = None,
    write_starts: bool = False,
  ):
    """Opens the plan; nothing is planned before the first row is asked for.

    Args:
      sources: the mixture.
      config: rates, row length and window.
      max_spans: sentinels that the vocabulary has.
      seed: of everything drawn.
      starts_path: file with the starts of windows that were planned before, see `WindowStarts`.
      write_starts: new starts are appended to it; for one process of a run.

    Raises:
      ValueError: a source with a share has no documents.
    """
    for i, source in enumerate(sources):
      if source.share > 0 and not len(source.store):
        raise ValueError(
          f"source {i} ({source.store.folder}) has a share of {source.share} and no documents."
        )
    self.sources, self.config, self.max_spans, self.seed = sources, config, max_spans, seed
    self.units = [Units(s.store, config.sequence_length) for s in sources]
    identity = fingerprint(sources, config, max_spans, seed) if starts_path else ""
    self._starts = WindowStarts(len(sources), starts_path, identity, write_starts)
    self._windows: dict[int, list[list[Placement]]] = {}
    self._pass_seeds = functools.lru_cache(4_096)(functools.partial(pass_seeds, seed))
    self._generators = SampleGenerators()
    self._lock = threading.Lock()

  def row(self, i: int) -> list[Placement]:
    """The samples of row `i` (>= 0), in order."""
    with self._lock:
      while i >= self._starts[-1].first_row:
        self._plan_window(len(self._starts) - 1)
      window = self._starts.window_of(i)
      return self._rows_of(window)[i - self._starts[window].first_row]

  def window(self, window: int) -> list[list[Placement]]:
    """All rows of a window (>= 0), in order."""
    with self._lock:
      while window >= len(self._starts) - 1:
        self._plan_window(len(self._starts) - 1)
      return self._rows_of(window)

  def plan(self, source: int, pass_: int, unit: int) -> SamplePlan:
    """What becomes of one unit in one pass."""
    spec, units = self.sources[source], self.units[source]
    lengths, is_image = units.lengths(spec.store, unit)
    candidates = []
    if spec.neighbors is not None:
      ids = spec.candidates(units.locate(unit)[0]).tolist()
      candidates = [spec.bank.segment_lengths(j)[0].tolist() for j in ids]
    rng = self._generators.at(self._pass_seeds(source, pass_)[0], unit)
    return plan_sample(lengths, is_image, candidates, rng, self.config, self.max_spans)

  def _rows_of(self, window: int) -> list[list[Placement]]:
    if window not in self._windows:
      self._plan_window(window)
    return self._windows[window]

  def _draw(self, start: Start) -> tuple[list[Placement], list[int], list[int]]:
    """The samples of the window that starts there, and what its sources have given when it ends: units and slots."""
    taken, used, samples = list(start.taken), list(start.used), []
    sizes, shares = [len(u) for u in self.units], [s.share for s in self.sources]
    progress = {i: used[i] / share for i, share in enumerate(shares) if share > 0}
    for _ in range(self.config.pack_window):
      source = min(progress, key=progress.get)
      pass_, offset = divmod(taken[source], sizes[source])
      order = self._pass_seeds(source, pass_)[1]
      unit = grain.experimental.index_shuffle(
        offset, max_index=sizes[source] - 1, seed=order, rounds=4
      )
      slots = self.plan(source, pass_, unit).length - 1
      samples.append(Placement(source, pass_, unit, slots))
      taken[source] += 1
      used[source] += slots
      progress[source] = used[source] / shares[source]
    return samples, taken, used

  def _plan_window(self, window: int) -> None:
    start = self._starts[window]
    samples, taken, used = self._draw(start)
    rows = pack_best_fit([s.slots for s in samples], self.config.sequence_length)
    order = np.random.default_rng((self.seed, window)).permutation(len(rows))
    self._windows[window] = [[samples[i] for i in rows[r]] for r in order]
    self._starts.add(window + 1, Start(start.first_row + len(rows), tuple(taken), tuple(used)))
    while len(self._windows) > 4:
      del self._windows[next(iter(self._windows))]
