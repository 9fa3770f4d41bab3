"""Defines the config section of training rows: how documents are joined, masked and packed."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

PAPER_NEIGHBORS, PAPER_CANDIDATES = 3, 4  # The paper uses 3 of 4 candidates.


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class DataConfig:
  """Settings of training rows. If tutorial and paper differ, the defaults follow the tutorial."""

  sequence_length: Annotated[int, Field(ge=2)] = 4_096
  """Number of positions of a row. The minimum, 2, fits a document of one token."""
  num_neighbors: NonNegativeInt = 2
  """K, the number of retrieved documents before each document with an image (paper: 3)."""
  neighbor_sampling: Literal["fixed", "paper", "uniform", "best"] = "fixed"
  """How neighbors are chosen from a document's candidates. `fixed`: K random candidates. `paper`:
  three random candidates of the best four (CM3Leon, section 2.1), so K must be 3. `uniform`: n
  random candidates, where n is random, uniform in {0, ..., K} (RA-CM3). `best`: the best K in
  descending order, as at inference. A document with fewer candidates gets fewer neighbors."""
  neighbor_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
  """Share of samples without neighbors, so that the model also works without a bank."""
  condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
  """Of the samples that end in an image and did not lose their neighbors by `neighbor_dropout`,
  share in which one sentinel replaces caption and neighbors, as in the unconditional stream of
  guidance (tutorial: 10%; the paper drops nothing)."""
  code_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Maximum share of input codes that `<unk>` replaces in a document's own images, if neighbors
  precede them, or in an instruction's target image, if an input image precedes it. The codes
  remain targets (word dropout, Bowman et al. 2016, section 3.1). The share of each sample is
  random, uniform in [0, code_dropout]. With hidden codes, the decoder learns earlier to use the
  preceding images."""
  code_dropout_alone: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Like `code_dropout`, for documents without neighbors and for instructions without an input
  image."""
  mean_spans: NonNegativeFloat = 1.0
  """Mean of the Poisson distribution of the number of CM3 spans. 0 means plain causal
  prediction."""
  whole_segment_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
  """Probability that the spans of a sample with several segments are whole segments."""
  neighbor_loss_weight: NonNegativeFloat = 1.0
  """Loss weight of neighbor tokens (CM3Leon: 1, RA-CM3: 0.1)."""
  text_share: Annotated[float, Field(ge=0, le=1)] = 0.7
  """Share of positions for text-only documents."""
  interleaved_share: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of positions for interleaved documents. Pairs get the remaining positions."""
  base_documents: NonNegativeInt = 0
  """Above 0: documents of the base, the run of --init_from, are read: those in its workdir, or the
  sample in its bundle. Its held-out documents show how much the run forgets. 0: none are read."""
  base_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Share of training positions for documents of the base; needs `base_documents`."""
  pack_window: PositiveInt = 65_536
  """Number of samples that are packed together by best fit. It bounds the planner's memory."""
  read_threads: PositiveInt = 2
  """Number of threads that prefetch batches."""
  on_bad_record: Literal["raise", "skip"] = "raise"
  """Reaction to a document that cannot be read. `raise` stops the run. `skip` replaces its sample
  by padding with loss weight 0 and prints a warning; all other samples stay the same."""
  max_skipped: NonNegativeInt = 100
  """Maximum number of different samples that a process may skip after each start. If more cannot be
  read, the run stops."""

  def __post_init__(self) -> None:
    if self.text_share + self.interleaved_share > 1:
      raise ValueError(
        f"text_share is {self.text_share} and interleaved_share is {self.interleaved_share}; "
        "their sum must be at most 1."
      )
    if self.neighbor_sampling == "paper" and self.num_neighbors != PAPER_NEIGHBORS:
      raise ValueError(
        f"neighbor_sampling is 'paper', which picks {PAPER_NEIGHBORS} of {PAPER_CANDIDATES} "
        f"candidates, but num_neighbors is {self.num_neighbors}; "
        f"set num_neighbors={PAPER_NEIGHBORS}."
      )

  def for_heldout(self) -> "DataConfig":
    """Returns the config of the rows for the held-out loss.

    These rows have no CM3 spans and no dropout. The best K neighbors precede each document.
    Neighbors have loss weight 0, because they are training documents.
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
