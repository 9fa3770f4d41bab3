"""Builds rows of tokens. Joins documents with neighbors, masks spans, packs samples into rows."""

# B rows of a batch, L positions of a row, T tokens of a sample.

from collections.abc import Callable, Iterable, Iterator
import threading
from typing import NamedTuple, Protocol

import grain
import jax
import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.data.documents.shard_files import BadRecord
from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.instructions.samples import InstructionPlan, build_instruction
from cm3leon_jax.data.rows import cm3
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.data.rows.sample_plan import SamplePlan, document_weights
from cm3leon_jax.errors import UserError
from cm3leon_jax.positions import positions_of
from cm3leon_jax.templates import Lengths
from cm3leon_jax.vocab import VocabLayout

FIELDS = {
  "inputs": np.int32,
  "targets": np.int32,
  "loss_weights": np.float32,
  "segment_ids": np.int32,
  "positions": np.int32,
}


def join(documents: list[Document], vocab: VocabLayout) -> np.ndarray:
  """Joins neighbors and a document, in this order, into a sample, [T] int32 (CM3Leon, 2.1).

  documents = [caption 50, image 519 520], [caption 40 41, image 517 518]
  result = [</s> 50 <break> 519 520 <break> 40 41 <break> 517 518 </s>]
  """
  segments = [s for d in documents for s in d.segments]
  return templates.of(vocab).join([s.tokens for s in segments], [s.is_image for s in segments])


class SampleTokens(NamedTuple):
  """Tokens of a sample, with their loss weights.

  Attributes:
    tokens: [T] int32.
    weights: [T] float32, the loss weight of predicting each token.
    own_codes: [T] bool. True for the image codes of the document, and False for its neighbors. In
      an instruction, True only for the codes of the target image.
    has_source: whether an input image or the image of a neighbor precedes these codes.
  """

  tokens: np.ndarray
  weights: np.ndarray
  own_codes: np.ndarray
  has_source: bool


def build_sample(
  document: Document,
  neighbors: list[Document],
  plan: SamplePlan,
  vocab: VocabLayout,
  neighbor_weight: float,
  image_weight: float = 1.0,
) -> SampleTokens:
  """Builds the sample that `plan` describes: neighbors, document, and spans moved to the end.

  If `plan.dropped`, the sample has only `<mask:0>` and the image. For the weights, see
  `document_weights`.

    spans [(6, 8)], neighbor_weight 0.1
    tokens  = [</s> 50 <break> 519 520 <break> <mask:0> <break> 517 518 </s> <mask:0> 40 41 <eoss>]
    weights = [0 .1 .1 .1 .1 .1 1 1 1 1 1 1 1 1 1]
    dropped
    tokens  = [</s> <mask:0> <break> 517 518 </s>], weights = [0 0 0 1 1 1]

  Raises:
    ValueError: the length differs from the plan, because the store changed after planning.
  """
  template = templates.of(vocab)
  parts, of_neighbors = lengths_of(document), [lengths_of(d) for d in neighbors]
  if plan.dropped:
    absent, image = template.absent, document.segments[-1].tokens
    tokens = template.join([*absent, image], [*[False] * len(absent), True])[: plan.length]
    own = vocab.is_image(tokens)
  else:
    joined = join([*neighbors, document], vocab)
    layout = cm3.cm3_layout(len(joined), plan.spans)[: plan.length]
    tokens = cm3.apply_cm3_mask(joined, plan.spans, vocab)[: plan.length]
    own = (layout >= template.start_of(of_neighbors, parts)) & vocab.is_image(tokens)
  if len(tokens) != plan.length:
    raise ValueError(
      f"document '{document.key}' gives a sample of {len(tokens)} tokens, but the plan has "
      f"{plan.length}: the store changed after planning; start the run again."
    )
  weights = document_weights(plan, parts, of_neighbors, neighbor_weight, template, image_weight)
  return SampleTokens(tokens, weights, own, bool(plan.neighbors))


def lengths_of(document: Document) -> Lengths:
  """Returns the lengths of the segments of a document, and whether each is an image."""
  segments = document.segments
  return [len(s.tokens) for s in segments], [s.is_image for s in segments]


def pack_row(
  samples: Iterable[tuple[np.ndarray, np.ndarray]],
  length: int,
  vocab: VocabLayout,
  align_images: bool = False,
) -> dict[str, np.ndarray]:
  """Packs samples into one row, one after another. No position predicts a token of another sample.

    samples = ([</s> 40 </s>], [0 1 1]), ([</s> <mask:0> <break> 517], [0 0 0 1]), length 7
    inputs       = [</s> 40 </s> <mask:0> <break> <pad> <pad>]
    targets      = [40 </s> <mask:0> <break> 517 <pad> <pad>]
    loss_weights = [1 1 0 0 1 0 0]
    segment_ids  = [1 1 2 2 2 0 0]
    positions    = [0 1 0 1 2 0 0]

  Args:
    samples: pairs of tokens [T] and weights [T]. The sum of T - 1 is at most `length`.
    length: number L of positions.
    align_images: as in `positions_of`.

  Returns:
    inputs, targets, segment_ids, positions: [L] int32; loss_weights: [L] float32.
  """
  row = {name: np.zeros(length, dtype) for name, dtype in FIELDS.items()}
  row["inputs"][:] = row["targets"][:] = vocab.pad
  at = 0
  for i, (tokens, weights) in enumerate(samples):
    place = slice(at, at + len(tokens) - 1)
    row["inputs"][place], row["targets"][place] = tokens[:-1], tokens[1:]
    row["loss_weights"][place] = weights[1:]
    row["segment_ids"][place] = i + 1
    row["positions"][place] = positions_of(tokens, vocab, align_images)[:-1]
    at = place.stop
  return row


def rows_of_samples(
  samples: list[np.ndarray], length: int, vocab: VocabLayout, align_images: bool = False
) -> dict[str, np.ndarray]:
  """Makes a [B, L] batch with one sample, [T] int32, per row. T <= L + 1. Loss weights are 1."""
  rows = [
    pack_row([(s, np.ones(len(s), np.float32))], length, vocab, align_images) for s in samples
  ]
  return {name: np.stack([row[name] for row in rows]) for name in FIELDS}


class NextPhase(NamedTuple):
  """The phase of the mixture that follows the phase of a loader.

  Attributes:
    first_row: its first row.
    open: returns its loader from the loader before it, from whose plan it continues.
    source_names: names of its sources and of those of later phases.
  """

  first_row: int
  open: Callable[["RowLoader"], "RowLoader"]
  source_names: tuple[str, ...]


class RowLoader:
  """Builds rows from their plan: `loader[i]` is row i, a dict of [L] arrays, see `pack_row`.

  With `mark_sources`, rows have an additional field `sources`, [L] int32: the number of the source
  of each position, counted from 1. Padding has 0.

  Rows from `next_phase.first_row` on come from the loader that `next_phase` opens when the first of
  them is read.
  """

  def __init__(
    self,
    plan: RowPlan,
    vocab: VocabLayout,
    align_images: bool = False,
    mark_sources: bool = False,
    next_phase: NextPhase | None = None,
  ):
    self.next_phase = next_phase
    self._next: RowLoader | None = None
    self.plan, self.vocab, self.align_images = plan, vocab, align_images
    self.mark_sources = mark_sources
    self._skipped: set[tuple[int, int, int]] = set()
    self._lock = threading.Lock()

  @property
  def source_names(self) -> tuple[str, ...]:
    """Returns the names of the sources of all phases. () without `mark_sources`."""
    if self.next_phase and self.mark_sources:
      return self.next_phase.source_names
    return tuple(source.name for source in self.plan.sources) if self.mark_sources else ()

  def of_row(self, i: int) -> "RowLoader":
    """Returns the loader of the phase of row `i`."""
    if self.next_phase is None or i < self.next_phase.first_row:
      return self
    with self._lock:
      self._next = self._next or self.next_phase.open(self)
    return self._next.of_row(i)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    if (loader := self.of_row(i)) is not self:
      return loader[i]
    config, placements = self.plan.config, self.plan.row(i)
    samples = [self._sample(*placement[:3]) for placement in placements]
    pairs = [sample[:2] for sample in samples]
    row = pack_row(pairs, config.sequence_length, self.vocab, self.align_images)
    if config.code_dropout or config.code_dropout_alone:
      at = 0
      for placement, sample in zip(placements, samples):
        most = config.code_dropout if sample.has_source else config.code_dropout_alone
        rng = self.plan.code_generator(*placement[:3])
        share = most * rng.random()  # Random, so that some samples keep almost all codes.
        hidden = sample.own_codes & (rng.random(len(sample.own_codes)) < share)
        row["inputs"][at : at + len(hidden) - 1][hidden[:-1]] = self.vocab.unk
        at += len(hidden) - 1
    if self.mark_sources:
      numbers = [p.source + 1 for p in placements]
      counts = [p.num_positions for p in placements]
      padding = config.sequence_length - sum(counts)
      row["sources"] = np.repeat([*numbers, 0], [*counts, padding]).astype(np.int32)
    return row

  def _sample(self, source: int, pass_: int, unit: int) -> SampleTokens:
    """Builds a sample. Returns padding if a document is unreadable and may be skipped."""
    try:
      return self._read_sample(source, pass_, unit)
    except BadRecord as error:
      self._skip((source, pass_, unit), error)
      length = self.plan.plan(source, pass_, unit).length
      nothing = np.zeros(length, bool)
      return SampleTokens(
        np.full(length, self.vocab.pad), np.zeros(length, np.float32), nothing, False
      )

  def _skip(self, place: tuple[int, int, int], error: BadRecord) -> None:
    """Counts and reports a skipped sample. Raises an error if skipping is not allowed."""
    config = self.plan.config
    if config.on_bad_record == "raise":
      raise error
    with self._lock:
      if place in self._skipped:
        return
      self._skipped.add(place)
      count = len(self._skipped)
    if count > config.max_skipped:
      raise UserError(
        f"{count} samples cannot be read, but config.data.max_skipped is {config.max_skipped}. The "
        f"last error: {error}"
      ) from error
    print(f"warning: skipped sample {count} of at most {config.max_skipped}: {error}", flush=True)

  def _read_sample(self, source: int, pass_: int, unit: int) -> SampleTokens:
    spec, units = self.plan.sources[source], self.plan.units[source]
    plan = self.plan.plan(source, pass_, unit)
    index, start = units.locate(unit)
    document = spec.store[index]
    lengths, is_image = units.lengths(spec.store, unit)
    if len(lengths) == 1 and not is_image[0]:
      piece = document.segments[0].tokens[start : start + int(lengths[0])]
      document = Document(**{**vars(document), "segments": (Segment(False, piece),)})
    if isinstance(plan, InstructionPlan):
      assert spec.instructions is not None
      loss = (spec.instructions.loss_on, spec.instructions.loss_weight)
      tokens, weights = build_instruction(document, plan, self.vocab, *loss)
      own, is_code = np.zeros(len(tokens), bool), self.vocab.is_image(tokens)
      if not plan.spans:  # If there are spans, the target is a text at the end, not an image.
        own[slice(*plan.target)] = True
      return SampleTokens(tokens, weights, own & is_code, bool((is_code & ~own).any()))
    candidates = spec.candidates(index)
    neighbors = []
    if plan.neighbors:
      assert spec.bank is not None
      neighbors = [spec.bank[int(candidates[j])] for j in plan.neighbors]
    config = self.plan.config
    factors = config.neighbor_loss_weight, config.image_loss_weight
    sample = build_sample(document, neighbors, plan, self.vocab, *factors)
    # An erased document, which has no key, keeps its place in the row, but has no loss.
    return sample if document.key else sample._replace(weights=np.zeros_like(sample.weights))


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> list[int]:
  """Returns the rows of a [B, L] batch of which devices of this process store at least a part."""
  indices = sharding.addressable_devices_indices_map(shape)
  return sorted({r for rows, _ in indices.values() for r in range(*rows.indices(shape[0]))})


class Rows(Protocol):
  """Random access to rows, with the plan that defines the rows."""

  plan: RowPlan

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    """Returns row i, see `RowLoader`."""


def batches(
  loader: Rows, first_row: int, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[dict[str, jax.Array]]:
  """Yields global batches forever. Batch j begins at row `first_row` + j * `batch_size`.

  Threads prefetch the rows of this process. A batch depends only on its row numbers, not on earlier
  batches or the number of processes. Batches are dicts of [B, L] arrays, see `RowLoader`, which are
  sharded by `sharding`.
  """
  config = loader.plan.config
  shape = (batch_size, config.sequence_length)
  rows = local_rows(sharding, shape)

  def load(j: int) -> dict[str, np.ndarray]:
    read = [loader[first_row + j * batch_size + r] for r in rows]
    return {name: np.stack([row[name] for row in read]) for name in read[0]}

  options = grain.ReadOptions(
    num_threads=config.read_threads, prefetch_buffer_size=2 * config.read_threads
  )
  dataset = grain.MapDataset.range(2**40).map(load).to_iter_dataset(options)
  place = {r: i for i, r in enumerate(rows)}
  for local in dataset:
    yield {
      name: jax.make_array_from_callback(
        shape,
        sharding,
        lambda index, x=x: x[[place[r] for r in range(*index[0].indices(batch_size))], index[1]],
      )
      for name, x in local.items()
    }
