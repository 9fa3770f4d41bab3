"""Plans the samples of each training row as a pure function of (seed, row).

Planning reads the lengths of documents and their candidate neighbors, but no tokens.
"""

# n documents, C candidates per document, L positions of a row. A sample of T tokens takes T - 1
# positions, one for each predicted token.

import bisect
import collections
from collections.abc import Sequence
import dataclasses
import functools
import threading
import typing
from typing import Any

from etils import epath
import grain
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
from cm3leon_jax.data.rows.sample_plan import SamplePlan, document_weights, plan_sample
from cm3leon_jax.templates import Lengths
from cm3leon_jax.vocab import VocabLayout

SCAN = 2**22  # Number of segment lengths that are read at a time.


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


def long_texts(store: DocumentStore, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Finds documents that consist of one text longer than `most` tokens.

  Returns the indices of these documents in ascending order, int64, and their lengths, int64.
  """
  offsets, lengths, is_image = map(np.asarray, (store.offsets, store.lengths, store.is_image))
  long = [np.zeros(0, np.int64)]
  for start in range(0, len(lengths), SCAN):
    block = slice(start, start + SCAN)
    long.append(start + np.flatnonzero((lengths[block] > most) & ~is_image[block]))
  segments = np.concatenate(long)
  documents = np.searchsorted(offsets, segments, side="right") - 1
  alone = offsets[documents + 1] - offsets[documents] == 1
  return documents[alone], lengths[segments[alone]].astype(np.int64)


class Units:
  """The units of a pass over a source: documents, and pieces of texts that do not fit into a row.

    sequence_length = 5, the documents are a text of 3 tokens and a text of 9 tokens
    units as (document, first token) = [(0, 0) (1, 0) (1, 4) (1, 8)]

  Memory grows only with the number of documents that are cut into pieces.
  """

  def __init__(self, store: DocumentStore, sequence_length: int):
    """Finds the documents of `store` that must be cut."""
    self._piece = sequence_length - 1  # A piece with </s> at both ends fills the row.
    self._cut, lengths = long_texts(store, self._piece)
    self._pieces = -(-lengths // self._piece)
    more = np.cumsum(self._pieces - 1)
    # Unit of the first piece of each cut document.
    self._first = self._cut + more - (self._pieces - 1)
    self._count = len(store) + (int(more[-1]) if len(more) else 0)

  def __len__(self) -> int:
    return self._count

  def locate(self, unit: int) -> tuple[int, int]:
    """Returns the document of a unit, and the index of its first token: 0 for a whole document."""
    at = int(self._first.searchsorted(unit, side="right")) - 1 if len(self._first) else -1
    if at < 0:
      return unit, 0
    piece, pieces = unit - int(self._first[at]), int(self._pieces[at])
    if piece < pieces:
      return int(self._cut[at]), piece * self._piece
    return int(self._cut[at]) + 1 + piece - pieces, 0

  def lengths(self, store: DocumentStore, unit: int) -> tuple[list[int], list[bool]]:
    """Returns the segment lengths of a unit, and whether each segment is an image."""
    document, start = self.locate(unit)
    lengths, is_image = (x.tolist() for x in store.segment_lengths(document))
    if len(lengths) == 1 and not is_image[0]:
      lengths = [min(lengths[0] - start, self._piece)]
    return lengths, is_image


class SampleGenerators(threading.local):
  """Reuses one generator per thread. A new generator per sample would be ten times slower."""

  def __init__(self) -> None:
    self._philox = np.random.Philox(0)
    self._generator = np.random.Generator(self._philox)
    self._state: Any = self._philox.state  # Any: the type stub rejects a tuple as the counter.

  def at(self, key: np.ndarray, unit: int, number: int = 0) -> np.random.Generator:
    """Returns a generator at the start of the random sequence (key, unit, number).

    The generator is valid until the next call in this thread. Philox is a function of a key, [2]
    uint64, and a counter (Salmon et al. 2011). Random sequences never overlap if the high
    words of their counters differ.
    """
    self._state["state"] = {"key": key, "counter": (0, 0, unit, number)}
    self._philox.state = self._state
    return self._generator


def pass_seeds(seed: int, source: int, pass_: int) -> tuple[np.ndarray, int]:
  """Computes the random key of a pass, [2] uint64, and the seed for the order of its units."""
  words = np.random.SeedSequence((seed, source, pass_)).generate_state(3, np.uint64)
  return words[:2], int(words[2]) % 2**32


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
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    at = bisect.bisect_left(sizes, lengths[i])
    row: list[int] = []
    free = row_length
    if at == len(sizes):
      rows.append(row)
    else:
      free = sizes[at]
      row = open_rows[free].pop()
      if not open_rows[free]:
        del sizes[at], open_rows[free]
    row.append(i)
    free -= lengths[i]
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
    self._windows: dict[int, list[list[Placement]]] = {}
    self._pass_seeds = functools.lru_cache(4_096)(functools.partial(pass_seeds, seed))
    self._generators = SampleGenerators()
    self._lock = threading.Lock()

  def row(self, i: int) -> list[Placement]:
    """Returns the samples of row `i` in their order. The plan has no row before `begin`."""
    with self._lock:
      window = self._window_of(i)
      return self._rows_of(window)[i - self._starts[window].first_row]

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
      return self._rows_of(window)

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

  def _rows_of(self, window: int) -> list[list[Placement]]:
    if window not in self._windows:
      self._plan_window(window)
    return self._windows[window]

  def _samples(self, start: Start) -> tuple[list[Placement], list[int], list[int]]:
    """Returns the samples of a window, and the units and positions used per source at its end."""
    taken, used, samples = list(start.taken), list(start.used), []
    sizes, shares = [len(u) for u in self.units], [s.share for s in self.sources]
    progress = {i: used[i] / share for i, share in enumerate(shares) if share > 0}
    for _ in range(self.config.pack_window):
      source = min(progress, key=progress.__getitem__)
      pass_, offset = divmod(taken[source], sizes[source])
      order = self._pass_seeds(source, pass_)[1]
      unit = grain.experimental.index_shuffle(
        offset, max_index=sizes[source] - 1, seed=order, rounds=4
      )
      num_positions = self.plan(source, pass_, unit).length - 1
      samples.append(Placement(source, pass_, unit, num_positions))
      taken[source] += 1
      used[source] += num_positions
      progress[source] = used[source] / shares[source]
    return samples, taken, used

  def _plan_window(self, window: int) -> None:
    start = self._starts[window]
    samples, taken, used = self._samples(start)
    rows = pack_best_fit([s.num_positions for s in samples], self.config.sequence_length)
    order = np.random.default_rng((self.seed, window)).permutation(len(rows))
    self._windows[window] = [[samples[i] for i in rows[r]] for r in order]
    self._starts.add(window + 1, Start(start.first_row + len(rows), tuple(taken), tuple(used)))
    while len(self._windows) > 4:
      del self._windows[next(iter(self._windows))]
