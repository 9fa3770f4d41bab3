"""Config section of the rows: how documents become what is trained on."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

PAPER_NEIGHBORS, PAPER_CANDIDATES = 3, 4  # Neighbors, and the candidates that they are of.


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class DataConfig:
  """How documents become rows. Defaults are the tutorial's where it differs from the paper."""

  sequence_length: Annotated[int, Field(ge=2)] = 4_096
  """Slots of a row; at least 2, the slots of a one-token document."""
  num_neighbors: NonNegativeInt = 2
  """K, the number of retrieved documents before each document with an image (paper: 3)."""
  neighbor_sampling: Literal["fixed", "paper", "uniform", "best"] = "fixed"
  """Choice among a document's candidates, in random order. `fixed`: any K; `paper`: three of the
  first four (CM3Leon, section 2.1), so K must be 3; `uniform`: any, their number uniform in {0,
  ..., K} (RA-CM3); `best`: the first K, best first, as at inference. Fewer where fewer
  candidates were kept."""
  neighbor_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
  """Share of samples that get no neighbors, so that the model also works without a bank."""
  condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
  """Share of the remaining samples with an image whose caption and neighbors are replaced by one
  sentinel, as in the unconditional stream of guidance (tutorial: 10%; the paper drops
  nothing)."""
  code_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Largest share of the codes of a document's own images that the decoder does not see after a
  neighbor, and of an image that an instruction asks for after a given one: it reads `<unk>` there,
  and still predicts the code (word dropout, Bowman et al. 2016, section 3.1). Each sample draws a
  share in [0, code_dropout]. A decoder that misses codes of its own image learns sooner to use the
  neighbor."""
  code_dropout_alone: Annotated[float, Field(ge=0, le=1)] = 0.0
  """The same for documents without a neighbor, and instructions without a given image."""
  mean_spans: NonNegativeFloat = 1.0
  """Lambda of the Poisson distribution of the number of spans; 0: plain causal prediction."""
  whole_segment_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
  """Probability that the spans of a sample with several segments are whole segments."""
  neighbor_loss_weight: NonNegativeFloat = 1.0
  """Weight of the loss on neighbors (CM3Leon 1, RA-CM3 0.1)."""
  text_share: Annotated[float, Field(ge=0, le=1)] = 0.7
  """Share of slots that text-only documents get."""
  interleaved_share: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of slots that documents of several texts and images get; pairs get the rest of the two
  shares."""
  pack_window: PositiveInt = 65_536
  """Number of samples that are packed together, best fit; it bounds the planner's memory."""
  read_threads: PositiveInt = 2
  """Number of threads that prefetch batches."""
  on_bad_record: Literal["raise", "skip"] = "raise"
  """What happens at a document that cannot be read: `raise` stops the run; `skip` leaves the place
  of its sample empty, with loss weight 0, and prints a warning. Other samples stay the same."""
  max_skipped: NonNegativeInt = 100
  """Number of different samples that a process skips, after each start, before it stops."""

  def __post_init__(self) -> None:
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
