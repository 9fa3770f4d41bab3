"""Reads training rows for inspection: contents from the arrays, origins from the plan."""

# L positions of a row, n documents, C candidates of each.

import dataclasses

import numpy as np

from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.instructions.samples import InstructionPlan
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.plan import Placement
from cm3leon_jax.reports import row_parts
from cm3leon_jax.reports.instruction_check import CheckedTask, check_instruction
from cm3leon_jax.reports.row_parts import RowPart, RowSample
from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class NeighborView:
  """Retrieved document.

  Attributes:
    rank: rank among the candidates, from 1.
    score: cosine similarity of the embeddings of this document and the query document.
  """

  document: Document
  rank: int
  candidates: int
  score: float


@dataclasses.dataclass(frozen=True)
class Origin:
  """Origin of a sample, according to the plan and the document stores.

  Attributes:
    document: document of the sample; for a long text, only the piece in the sample.
    neighbors: neighbors, in the order in which they precede the document.
    pass_: number of complete passes over the source before this sample.
    piece_start: index of the piece's first token in the text.
    text_length: number of tokens of the whole text; 0 for documents that are not texts.
    task: instruction task of the document, or None if it is not an instruction.
  """

  document: Document
  neighbors: tuple[NeighborView, ...]
  pass_: int
  piece_start: int = 0
  text_length: int = 0
  task: CheckedTask | None = None

  @property
  def documents(self) -> list[Document]:
    return [*(n.document for n in self.neighbors), self.document]


@dataclasses.dataclass(frozen=True)
class SampleView:
  """A sample, its parts and its origin.

  Attributes:
    parts: result of `row_parts.split_parts`.
    segments: result of `row_parts.restore`.
    owners: for each segment, the index of its document in `origin.documents`.
    dropped: whether `<mask:0>` replaces caption and neighbors, or everything before the target of
      an instruction.
    missing: number of tokens that were cut off because the row was full.
    target: half-open range of an instruction's target in the sample; None for other samples.
  """

  sample: RowSample
  origin: Origin
  parts: list[RowPart]
  segments: list[list[RowPart]]
  owners: list[int]
  dropped: bool
  missing: int
  target: tuple[int, int] | None = None

  def owner_name(self, segment: int) -> str:
    """Returns `neighbor 1`, `neighbor 2`, ..., or `the document`."""
    owner = self.owners[segment]
    return f"neighbor {owner + 1}" if owner < len(self.origin.neighbors) else "the document"


@dataclasses.dataclass(frozen=True)
class RowView:
  """A row: its number, its samples and its `loss_weights`, [L] float32."""

  number: int
  samples: list[SampleView]
  loss_weights: np.ndarray


def find_origin(loader: RowLoader, scores: np.ndarray | None, placement: Placement) -> Origin:
  """Looks up the documents of a sample in the plan and the stores. For `scores`, see `read_row`."""
  source, pass_, unit = placement[:3]
  spec = loader.plan.sources[source]
  index, start = loader.plan.units[source].locate(unit)
  document, candidates = spec.store[index], spec.candidates(index)
  plan = loader.plan.plan(source, pass_, unit)
  if isinstance(plan, InstructionPlan):
    assert spec.instructions is not None
    target = tuple(spec.instructions.targets[index].tolist())
    return Origin(document, (), pass_, task=CheckedTask(spec.name, target, plan, spec.instructions))
  neighbors: tuple[NeighborView, ...] = ()
  if plan.neighbors:
    assert spec.bank is not None
    assert scores is not None
    bank, similar = spec.bank, scores[index]
    neighbors = tuple(
      NeighborView(bank[int(candidates[j])], j + 1, len(candidates), float(similar[j]))
      for j in plan.neighbors
    )
  if len(document.segments) > 1 or document.segments[0].is_image:
    return Origin(document, neighbors, pass_)
  text = document.segments[0].tokens
  # With a `</s>` at both ends, a piece fills a row.
  stop = start + loader.plan.config.sequence_length - 1
  document = dataclasses.replace(document, segments=(Segment(False, text[start:stop]),))
  return Origin(document, neighbors, pass_, start, len(text))


def read_row(loader: RowLoader, scores: np.ndarray | None, number: int) -> RowView:
  """Reads a row and checks every sample against its documents.

  `scores` are [n, C] float32 similarities of the candidates of each pair (`load_neighbors`); None
  if the run has no neighbors.

  Raises:
    ValueError: the row differs from the plan. The message names the row and the sample.
  """
  row, placements = loader[number], loader.plan.row(number)
  try:
    samples = row_parts.split_row(row, loader.vocab, loader.align_images)
  except ValueError as error:
    raise ValueError(f"row {number}: {error}") from error
  if len(samples) != len(placements):
    raise ValueError(f"row {number} has {len(samples)} samples; {len(placements)} were planned.")
  views = []
  for sample, placement in zip(samples, placements):
    origin = find_origin(loader, scores, placement)
    try:
      if "sources" in row:
        stop = sample.start + sample.num_positions
        _check_source(row["sources"][sample.start : stop], placement)
      views.append(view_sample(sample, origin, loader.vocab, loader.plan.config.sequence_length))
    except ValueError as error:
      raise ValueError(f"row {number}, segment id {sample.segment_id}: {error}") from error
  return RowView(number, views, row["loss_weights"])


def _check_source(marks: np.ndarray, placement: Placement) -> None:
  if (marks != placement.source + 1).any():
    raise ValueError(f"its positions are marked with the sources {sorted(set(marks.tolist()))}.")


def view_sample(sample: RowSample, origin: Origin, vocab: VocabLayout, length: int) -> SampleView:
  """Checks a sample against its documents and splits it into parts.

  Raises:
    ValueError: the sample differs from its documents (see `row_parts.check_sample` and
      `instruction_check.check_instruction`).
  """
  documents, missing, target = origin.documents, 0, None
  if origin.task is None:
    missing = row_parts.check_sample(sample.tokens, documents, vocab, length)
  else:
    target = check_instruction(sample, origin.document, origin.task, vocab, length)
  parts = row_parts.split_parts(sample.tokens, vocab)
  dropped = row_parts.is_dropped(sample.tokens, vocab)
  owners = [i for i, document in enumerate(documents) for _ in document.segments]
  if dropped:
    owners = [len(documents) - 1] * 2
  segments = row_parts.restore(parts)
  return SampleView(sample, origin, parts, segments, owners, dropped, missing, target)
