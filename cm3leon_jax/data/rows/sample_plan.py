"""Plans one sample: its neighbors, CM3 spans and length, from lengths and a random generator."""

# K neighbors of a document.

import dataclasses
import typing

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT
from cm3leon_jax.data.rows import cm3

PAPER_NEIGHBORS, PAPER_CANDIDATES = 3, 4


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
  code_dropout: typing.Annotated[float, Field(ge=0, le=1)] = 0.0
  """Largest share of the codes of a document's own images that the decoder does not see after a
  neighbor, and of an image that an instruction asks for after a given one: it reads `<unk>` there,
  and still predicts the code (word dropout, Bowman et al. 2016, section 3.1). Each sample draws a
  share in [0, code_dropout]. A decoder that misses codes of its own image learns sooner to use the
  neighbor."""
  code_dropout_alone: typing.Annotated[float, Field(ge=0, le=1)] = 0.0
  """The same for documents without a neighbor, and instructions without a given image."""
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
  on_bad_record: typing.Literal["raise", "skip"] = "raise"
  """What happens at a document that cannot be read: `raise` stops the run; `skip` leaves the place
  of its sample empty, with loss weight 0, and prints a warning. Other samples stay the same."""
  max_skipped: NonNegativeInt = 100
  """Number of different samples that a process skips, after each start, before it stops."""

  def __post_init__(self):
    if self.text_share + self.interleaved_share > 1:
      raise ValueError(
        f"text_share is {self.text_share} and interleaved_share {self.interleaved_share}; "
        "their sum must be at most 1."
      )
    if self.neighbor_sampling == "paper" and self.num_neighbors != PAPER_NEIGHBORS:
      raise ValueError(
        f"neighbor_sampling is 'paper', which picks {PAPER_NEIGHBORS} of {PAPER_CANDIDATES} "
        f"candidates, and num_neighbors is {self.num_neighbors}; "
        f"set num_neighbors={PAPER_NEIGHBORS}."
      )

  def for_heldout(self) -> "DataConfig":
    """Returns the config of the rows of the held-out loss.

    Documents are causal and whole, without spans and drops. The best K neighbors precede each
    document; they are not scored, because they are training documents.
    """
    return dataclasses.replace(
      self,
      neighbor_sampling="best",
      neighbor_dropout=0.0,
      condition_dropout=0.0,
      code_dropout=0.0,
      code_dropout_alone=0.0,
      mean_spans=0.0,
      neighbor_loss_weight=0.0,
    )


class SamplePlan(typing.NamedTuple):
  """Neighbors, spans and length of the sample of one document.

  Attributes:
    neighbors: indices into the document's candidates, in the order of the row.
    dropped: whether `<mask:0>` replaces caption and neighbors.
    spans: CM3 spans, half-open ranges of the joined sample.
    length: tokens of the transformed sample.
    missing: number of neighbors that are missing because too few candidates were kept.
    crowded_out: number of picked neighbors that were left out because they did not fit.
  """

  neighbors: tuple[int, ...]
  dropped: bool
  spans: tuple[tuple[int, int], ...]
  length: int
  missing: int = 0
  crowded_out: int = 0


def joined_length(segment_lengths) -> int:
  """Counts the tokens of `</s> segment <break> ... segment </s>`."""
  return int(sum(segment_lengths)) + len(segment_lengths) + 1


def pick_neighbors(
  num_candidates: int, rng: np.random.Generator, config: DataConfig
) -> tuple[list[int], int]:
  """Returns the indices of the picked candidates, in row order, and the number of missing ones."""
  if config.neighbor_sampling == "paper":
    num_candidates = min(num_candidates, PAPER_CANDIDATES)
  wanted = config.num_neighbors
  if config.neighbor_sampling == "uniform":
    wanted = int(rng.integers(wanted + 1))
  if config.neighbor_sampling == "best":
    picked = list(range(min(wanted, num_candidates)))
  else:
    picked = rng.permutation(num_candidates)[:wanted].tolist()
  return picked, wanted - len(picked)


def plan_sample(
  lengths, is_image, candidates, rng: np.random.Generator, config: DataConfig, max_spans: int
) -> SamplePlan:
  """Samples all choices that decide a sample's length; planner and loader get equal plans.

    lengths = [4, 16], candidates = [[4, 16], [4, 16]], two neighbors picked, two spans wanted
    sequence_length 1,000: two neighbors and spans
    sequence_length 60: the first neighbor and spans
    sequence_length 30: no neighbor, but spans
    sequence_length 22: the document alone, 23 tokens; 10: its first 11 tokens

  Args:
    lengths: segment lengths of the document.
    is_image: whether each segment is an image.
    candidates: segment lengths of each candidate neighbor.
    rng: generator of the sample, at its start.
    config: rates and the row length.
    max_spans: number of sentinels in the vocabulary.

  Returns:
    A plan of at most `config.sequence_length` + 1 tokens. If a sample is too long, whole neighbors
    are left out, the last first, then spans, then the end of the document.
  """
  limit = config.sequence_length + 1
  neighbors, missing = [], 0
  if any(is_image) and rng.random() >= config.neighbor_dropout:
    neighbors, missing = pick_neighbors(len(candidates), rng, config)
    if rng.random() < config.condition_dropout and is_image[-1]:
      return SamplePlan((), True, (), min(int(lengths[-1]) + 4, limit))
  num_spans = min(int(rng.poisson(config.mean_spans)), max_spans)
  whole_segments = rng.random() < config.whole_segment_rate
  picked = len(neighbors)
  total = joined_length(lengths) + sum(joined_length(candidates[i]) - 1 for i in neighbors)
  while neighbors and total + cm3.OVERHEAD * num_spans > limit:
    total -= joined_length(candidates[neighbors.pop()]) - 1
  joined = [n for i in neighbors for n in candidates[i]] + list(lengths)
  num_spans = max(0, min(num_spans, (limit - total) // cm3.OVERHEAD))
  spans = cm3.sample_spans(joined, num_spans, whole_segments, rng) if num_spans else ()
  length = min(total + cm3.OVERHEAD * len(spans), limit)
  return SamplePlan(tuple(neighbors), False, spans, length, missing, picked - len(neighbors))
