"""Plans the samples of each row as a pure function of (sources, config, seed, row).

Planning reads the lengths of documents and their candidate neighbors, but no tokens.
"""

# n documents, C candidates per document, L positions of a row. A sample of T tokens takes T - 1
# positions, one for each predicted token.

import bisect
import collections
from collections.abc import Callable, Sequence
import concurrent.futures
import dataclasses
import functools
import itertools
import threading
import typing

from etils import epath
import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.documents.store import Bank, DocumentStore
from cm3leon_jax.data.instructions.samples import (
  InstructionPlan,
  Instructions,
  instruction_weights,
  plan_instruction,
)
from cm3leon_jax.data.rows.plan_starts import Start, WindowStarts, fingerprint
from cm3leon_jax.data.rows.random_streams import (
  MAX_MEAN,
  RandomStreams,
  SampleGenerators,
  pass_seeds,
  shuffled,
)
from cm3leon_jax.data.rows.sample_lengths import sample_lengths
from cm3leon_jax.data.rows.sample_plan import SamplePlan, document_weights, plan_sample
from cm3leon_jax.data.rows.units import Units
from cm3leon_jax.templates import Lengths
from cm3leon_jax.vocab import VocabLayout

MIN_AHEAD = 256  # Smallest number of samples of a source that are planned at a time.


class Placement(typing.NamedTuple):
  """One sample of a row: its source, pass over the source, unit, and number of positions."""

  source: int
  pass_: int
  unit: int
  num_positions: int


@dataclasses.dataclass
class RowSource:
  """A source of training rows: documents that together have one share of the mixture.

  Attributes:
    share: share of all positions. The shares of a mixture sum to 1.
    neighbors: [n, C] int32, the candidates of each document as indices into `bank`, padded with -1.
      None if the source has no neighbors.
    instructions: targets and weights of instruction documents. None for other documents.
    name: name of the source in logs: "pairs", or the name of a task.
  """

  store: DocumentStore
  share: float
  neighbors: np.ndarray | None = None
  bank: Bank | DocumentStore | None = None
  instructions: Instructions | None = None
  name: str = ""

  def candidates(self, document: int) -> np.ndarray:
    """Returns the candidates of a document as indices into `bank`, without padding."""
    if self.neighbors is None:
      return np.zeros(0, np.int32)
    ids = self.neighbors[document]
    return ids[ids >= 0]


class SampleQueue:
  """The samples of a source that are planned ahead, in the order in which windows take them.

  Attributes:
    samples: [n, 3] int64, pass, unit and number of positions of each sample.
  """

  def __init__(self, plan: Callable[[int, int], np.ndarray]):
    """Takes a function that plans (n) samples from the one with a given number on."""
    self._plan, self._first, self._skipped = plan, 0, 0
    self.samples = np.zeros((0, 3), np.int64)

  def skip_to(self, number: int) -> None:
    """Continues at the sample `number`."""
    self._skipped = number - self._first
    known = 0 <= self._skipped <= len(self.samples)
    self.samples = self.samples[self._skipped :] if known else self.samples[:0]
    self._first = number

  def extend(self) -> None:
    """Plans at least as many more samples as are known, or as the last window took."""
    known = len(self.samples)
    last = self._skipped if known else 0
    more = self._plan(self._first + known, max(MIN_AHEAD, known, last))
    self.samples = np.concatenate([self.samples, more])


class Window(typing.NamedTuple):
  """A planned window: its samples as `Placement`s, [n, 4], the samples of each row, and its end."""

  samples: np.ndarray
  rows: list[list[int]]
  end: Start

  def row(self, at: int) -> list[Placement]:
    """Returns the samples of the row with the number `at` in the window."""
    return [Placement(*values) for values in self.samples[self.rows[at]].tolist()]


def _lengths(bank: Bank | DocumentStore, document: int) -> Lengths:
  lengths, is_image = bank.segment_lengths(document)
  return lengths.tolist(), is_image.tolist()


def pack_best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
  """Packs samples into rows by best fit: the longest first, each into the fullest possible row.

  `lengths` are the numbers of positions that the samples take.

  >>> pack_best_fit([3, 6, 4, 2], 8)
  [[1, 3], [2, 0]]
  """
  rows: list[list[int]] = []
  # Number of free positions -> the rows with that many free positions.
  open_rows: dict[int, list[list[int]]] = collections.defaultdict(list)
  sizes: list[int] = []  # The keys of `open_rows` in ascending order.
  longest = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
  for length, group in itertools.groupby(longest, key=lengths.__getitem__):
    left = list(group)
    while left:
      at = bisect.bisect_left(sizes, length)
      row: list[int] = []
      free = row_length
      if at == len(sizes):
        rows.append(row)
      else:
        free = sizes[at]
        row = open_rows[free].pop()
        if not open_rows[free]:
          del sizes[at], open_rows[free]
      count = free // length  # The fullest possible row stays the same while it has space.
      row += left[:count]
      free -= length * min(count, len(left))
      left = left[count:]
      if free:
        if free not in open_rows:
          bisect.insort(sizes, free)
        open_rows[free].append(row)
  return rows


class RowPlan:
  """Computes which samples a row contains, for any row. Thread-safe.

  A plan proceeds in windows of samples. A window takes samples from the sources by their shares of
  positions, packs them into rows by best fit, and shuffles the rows. Each window begins where the
  previous window ends. The first access to a row therefore plans all earlier windows, unless a file
  contains the starts of these windows. The newest windows stay in memory.
  """

  def __init__(
    self,
    sources: list[RowSource],
    config: DataConfig,
    vocab: VocabLayout,
    seed: int,
    starts_path: epath.PathLike | None = None,
    write_starts: bool = False,
    begin: Start | None = None,
  ):
    """Opens the plan. Windows are planned only when a row is accessed.

    `starts_path` is the file with the starts of earlier windows, see `WindowStarts`. If
    `write_starts`, new starts are appended to the file; only one process of a run sets it. `begin`
    is the start of window 0 if the plan continues another one, see `start_of_phase`.

    Raises:
      ValueError: a source has a share above 0, but no documents.
    """
    for i, source in enumerate(sources):
      if source.share > 0 and not len(source.store):
        raise ValueError(
          f"source {i} ({source.store.folder}) has a share of {source.share}, but no documents."
        )
    self.sources, self.config, self.vocab, self.seed = sources, config, vocab, seed
    self.units = [Units(s.store, config.sequence_length) for s in sources]
    begin = begin or Start(0, (0,) * len(sources), (0,) * len(sources))
    identity = fingerprint(sources, config, vocab.num_masks, seed, begin) if starts_path else ""
    self._starts = WindowStarts(begin, starts_path, identity, write_starts)
    self._windows: dict[int, Window] = {}
    self._ahead: dict[int, concurrent.futures.Future[Window]] = {}
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "row plan")
    self._queues = [
      SampleQueue(functools.partial(self._plan_samples, i)) for i in range(len(sources))
    ]
    self._pass_seeds = functools.lru_cache(4_096)(functools.partial(pass_seeds, seed))
    self._generators = SampleGenerators()
    self._lock = threading.Lock()

  def row(self, i: int) -> list[Placement]:
    """Returns the samples of row `i` in their order. The plan has no row before `begin`."""
    with self._lock:
      number = self._window_of(i)
      window, at = self._planned(number), i - self._starts[number].first_row
      if 2 * at >= len(window.rows) and number + 1 not in (*self._windows, *self._ahead):
        self._ahead = {number + 1: self._submit(number + 1)}
      return window.row(at)

  def start_of_phase(self, first_row: int, num_sources: int) -> Start:
    """Returns where a plan of other shares continues this plan, at row `first_row`.

    The passes over the sources go on. Samples of the last window whose rows are not read any more
    are left out, and the shares count from zero. Sources beyond those of this plan are new.
    """
    with self._lock:
      taken = self._starts[self._window_of(first_row - 1) + 1].taken
    new = (0,) * (num_sources - len(taken))
    return Start(first_row, (*taken, *new), (0,) * num_sources)

  def _window_of(self, i: int) -> int:
    """Returns the window of row `i`, and plans all windows up to it."""
    while i >= self._starts[-1].first_row:
      self._plan_window(len(self._starts) - 1)
    return self._starts.window_of(i)

  def window(self, window: int) -> list[list[Placement]]:
    """Returns all rows of a window (>= 0) in their order."""
    with self._lock:
      while window >= len(self._starts) - 1:
        self._plan_window(len(self._starts) - 1)
      planned = self._planned(window)
      return [planned.row(at) for at in range(len(planned.rows))]

  def plan(self, source: int, pass_: int, unit: int) -> SamplePlan | InstructionPlan:
    """Plans the sample of one unit in one pass over its source."""
    spec, units = self.sources[source], self.units[source]
    lengths, is_image = units.lengths(spec.store, unit)
    if spec.instructions is not None:
      target = spec.instructions.targets[units.locate(unit)[0]]
      rng = self._generators.at(self._pass_seeds(source, pass_)[0], unit)
      drops = spec.instructions.drops
      return plan_instruction(lengths, is_image, tuple(target.tolist()), rng, drops, self.vocab)
    ids = spec.candidates(units.locate(unit)[0]) if spec.neighbors is not None else ()
    rng = self._generators.at(self._pass_seeds(source, pass_)[0], unit)

    def lengths_of(i: int) -> Lengths:
      assert spec.bank is not None
      return _lengths(spec.bank, int(ids[i]))

    document = lengths, is_image
    return plan_sample(document, len(ids), lengths_of, rng, self.config, self.vocab)

  def loss_weights(self, source: int, pass_: int, unit: int) -> np.ndarray:
    """Returns the loss weight of predicting each token of a sample, [T] float32."""
    spec, units = self.sources[source], self.units[source]
    plan = self.plan(source, pass_, unit)
    if isinstance(plan, InstructionPlan):
      assert spec.instructions is not None
      return instruction_weights(plan, spec.instructions.loss_on, spec.instructions.loss_weight)
    neighbors = []
    if plan.neighbors:
      assert spec.bank is not None
      ids = spec.candidates(units.locate(unit)[0])[list(plan.neighbors)].tolist()
      neighbors = [_lengths(spec.bank, j) for j in ids]
    document, weight = units.lengths(spec.store, unit), self.config.neighbor_loss_weight
    of_images, template = self.config.image_loss_weight, templates.of(self.vocab)
    return document_weights(plan, document, neighbors, weight, template, of_images)

  def code_generator(self, source: int, pass_: int, unit: int) -> np.random.Generator:
    """Returns the generator that chooses the hidden codes of a unit, see `SampleGenerators.at`."""
    return self._generators.at(self._pass_seeds(source, pass_)[0], unit, 1)

  def _planned(self, window: int) -> Window:
    if window not in self._windows:
      self._plan_window(window)
    return self._windows[window]

  def _submit(self, window: int) -> concurrent.futures.Future[Window]:
    """Plans a window in the thread that plans all windows, one after another."""
    return self._thread.submit(self._compute, window, self._starts[window])

  def _plan_window(self, window: int) -> None:
    planned = (self._ahead.pop(window, None) or self._submit(window)).result()
    self._windows[window] = planned
    self._starts.add(window + 1, planned.end)
    while len(self._windows) > 4:
      del self._windows[next(iter(self._windows))]

  def _compute(self, window: int, start: Start) -> Window:
    samples = self._samples(start)
    rows = pack_best_fit(samples[:, 3].tolist(), self.config.sequence_length)
    order = np.random.default_rng((self.seed, window)).permutation(len(rows))
    count = len(self.sources)
    used = np.bincount(samples[:, 0], samples[:, 3], count).astype(np.int64) + start.used
    taken = np.bincount(samples[:, 0], minlength=count) + start.taken
    end = Start(start.first_row + len(rows), tuple(taken.tolist()), tuple(used.tolist()))
    return Window(samples, [rows[r] for r in order], end)

  def _samples(self, start: Start) -> np.ndarray:
    """Returns the samples of a window as `Placement`s, [n, 4].

    The next sample is always one of the source that has used the fewest positions for its share.
    """
    queues = [i for i, source in enumerate(self.sources) if source.share > 0]
    for i in queues:
      self._queues[i].skip_to(start.taken[i])
    while True:
      progress = [
        (start.used[i] + np.cumsum([0, *self._queues[i].samples[:, 2]])) / self.sources[i].share
        for i in queues
      ]
      # The order is known up to where the first source has no more planned samples.
      end, short = min((p[-1], i) for i, p in zip(queues, progress))
      known = [int(p.searchsorted(end)) for p in progress]
      if sum(known) >= self.config.pack_window:
        break
      self._queues[short].extend()
    order = np.concatenate([p[:n] for p, n in zip(progress, known)])
    samples = [self._queues[i].samples[:n] for i, n in zip(queues, known)]
    number = np.repeat(queues, known)
    first = np.lexsort((number, order))[: self.config.pack_window]
    return np.column_stack([number, np.concatenate(samples)])[first]

  def _plan_samples(self, source: int, first: int, count: int) -> np.ndarray:
    """Returns pass, unit and number of positions of the samples of a source from `first` on."""
    size = len(self.units[source])
    passes, offsets = np.divmod(np.arange(first, first + count), size)
    seeds = [self._pass_seeds(source, pass_) for pass_ in range(passes[0], passes[-1] + 1)]
    ends = np.searchsorted(passes, np.arange(passes[0], passes[-1] + 1), side="right")
    parts = zip(np.split(offsets, ends[:-1]), seeds)
    units = np.concatenate([shuffled(part, size, seed) for part, (_, seed) in parts])
    keys = np.repeat([key for key, _ in seeds], np.diff(ends, prepend=0), axis=0)
    lengths = self._sample_lengths(source, passes, units, keys)
    return np.column_stack([passes, units, lengths - 1])

  def _sample_lengths(
    self, source: int, passes: np.ndarray, units: np.ndarray, keys: np.ndarray
  ) -> np.ndarray:
    """Returns the numbers of tokens of samples; `keys` are those of their passes."""
    spec = self.sources[source]
    if spec.instructions is not None or self.config.mean_spans >= MAX_MEAN:
      places = zip(passes.tolist(), units.tolist())
      return np.array([self.plan(source, pass_, unit).length for pass_, unit in places])
    documents, segments = self.units[source].segments(spec.store, units)
    candidates = np.zeros((len(units), 0), np.int64)
    bank: Sequence[DocumentStore] = ()
    if spec.neighbors is not None and spec.bank is not None:
      candidates, bank = np.asarray(spec.neighbors[documents], np.int64), spec.bank.parts
    streams = RandomStreams(keys, units)
    return sample_lengths(segments, candidates, bank, streams, self.config, self.vocab)
