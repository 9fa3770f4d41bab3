"""Rows as the trainer reads them, for a person: what stands in a row is read off its arrays, the plan only names it."""

# L slots of a row, n documents, C candidates of each.

import dataclasses

import numpy as np

from cm3leon_jax.data.documents import Document, Segment
from cm3leon_jax.data.pipeline import RowLoader
from cm3leon_jax.data.plan import Placement
from cm3leon_jax.reports import row_parts
from cm3leon_jax.reports.row_parts import Part, Sample
from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class Neighbor:
  """A retrieved document.

  Attributes:
    rank: its place among the candidates of the document, from 1.
    candidates: how many there are.
    score: cosine of its embedding to the document's.
  """

  document: Document
  rank: int
  candidates: int
  score: float


@dataclasses.dataclass(frozen=True)
class Origin:
  """What the plan and the stores know of a sample and its tokens do not say.

  Attributes:
    document: of a long text only the piece that the sample holds.
    neighbors: in the order in which they stand before it.
    pass_: how often its source had been read before.
    piece: the piece's first token within the text.
    whole: tokens of the text that the piece is of.
  """

  document: Document
  neighbors: tuple[Neighbor, ...]
  pass_: int
  piece: int = 0
  whole: int = 0

  @property
  def documents(self) -> list[Document]:
    return [*(n.document for n in self.neighbors), self.document]


@dataclasses.dataclass(frozen=True)
class SampleView:
  """A sample, what it is made of, and where that comes from.

  Attributes:
    parts: of `row_parts.split_parts`.
    segments: of `row_parts.restore`.
    owners: per segment the place of its document in `origin.documents`.
    dropped: caption and neighbors gave way to `<mask:0>`.
    lacking: tokens that were cut off because the row was full.
  """

  sample: Sample
  origin: Origin
  parts: list[Part]
  segments: list[list[Part]]
  owners: list[int]
  dropped: bool
  lacking: int

  def whose(self, segment: int) -> str:
    """`neighbor 1`, ..., or `the document`."""
    owner = self.owners[segment]
    return f"neighbor {owner + 1}" if owner < len(self.origin.neighbors) else "the document"


@dataclasses.dataclass(frozen=True)
class RowView:
  """A row: its number, its samples, and `loss_weights` [L] float32 as they stand in it."""

  number: int
  samples: list[SampleView]
  loss_weights: np.ndarray


def find_origin(loader: RowLoader, scores: np.ndarray, placement: Placement) -> Origin:
  """Asks the plan and the stores what a sample should hold, and how it is called; scores: [n, C], of the source of pairs."""
  source, pass_, unit = placement[:3]
  spec = loader.plan.sources[source]
  index, start = loader.plan.units[source].locate(unit)
  document, candidates = spec.store[index], spec.candidates(index)
  neighbors = tuple(
    Neighbor(spec.bank[int(candidates[j])], j + 1, len(candidates), float(scores[index][j]))
    for j in loader.plan.plan(source, pass_, unit).neighbors
  )
  if len(document.segments) > 1 or document.segments[0].is_image:
    return Origin(document, neighbors, pass_)
  text = document.segments[0].tokens
  piece = text[
    start : start + loader.plan.config.sequence_length - 1
  ]  # With </s> at both ends it fills a row.
  return Origin(
    dataclasses.replace(document, segments=(Segment(False, piece),)),
    neighbors,
    pass_,
    start,
    len(text),
  )


def read_rows(loader: RowLoader, scores: np.ndarray, numbers) -> list[RowView]:
  """Reads rows `numbers` and takes them apart.

  Args:
    loader: of the split.
    scores: [n, C] float32 of the pairs' candidates, of `load_neighbors`.
    numbers: of the rows.

  Raises:
    ValueError: a row does not hold what it should; names the row and the sample.
  """
  return [read_row(loader, scores, number) for number in numbers]


def read_row(loader: RowLoader, scores: np.ndarray, number: int) -> RowView:
  row, placements = loader[number], loader.plan.row(number)
  try:
    samples = row_parts.split_row(row, loader.vocab)
  except ValueError as error:
    raise ValueError(f"row {number}: {error}") from error
  if len(samples) != len(placements):
    raise ValueError(f"row {number} holds {len(samples)} samples; {len(placements)} were planned.")
  views = []
  for sample, placement in zip(samples, placements):
    origin = find_origin(loader, scores, placement)
    try:
      views.append(view_sample(sample, origin, loader.vocab, loader.plan.config.sequence_length))
    except ValueError as error:
      raise ValueError(f"row {number}, segment id {sample.segment_id}: {error}") from error
  return RowView(number, views, row["loss_weights"])


def view_sample(sample: Sample, origin: Origin, vocab: VocabLayout, length: int) -> SampleView:
  """Checks a sample of a row of `length` slots against its documents and takes it apart; raises as `check_sample`."""
  documents = origin.documents
  lacking = row_parts.check_sample(sample.tokens, documents, vocab, length)
  parts = row_parts.split_parts(sample.tokens, vocab)
  dropped = row_parts.is_dropped(sample.tokens, vocab)
  owners = (
    [len(documents) - 1] * 2
    if dropped
    else [i for i, d in enumerate(documents) for _ in d.segments]
  )
  return SampleView(sample, origin, parts, row_parts.restore(parts), owners, dropped, lacking)
