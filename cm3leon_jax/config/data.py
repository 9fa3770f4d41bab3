"""Defines the config sections of data: raw records, retrieval, and training rows."""

import dataclasses
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT

MOST_CROPS = 999  # Of an image, in a config.
# Fields that a phase may set. `replay_share` is a field of the section `instructions`.
PHASED = (
  *("text_share", "interleaved_share", "base_share", "replay_share", "num_neighbors"),
  *("neighbor_sampling", "neighbor_dropout", "condition_dropout", "code_dropout"),
  *("code_dropout_alone", "mean_spans", "whole_segment_rate"),
  *("neighbor_loss_weight", "image_loss_weight"),
)
PAPER_NEIGHBORS, PAPER_CANDIDATES = 3, 4  # The paper uses 3 of 4 candidates.


def _phase(value: Any) -> Any:
  """Converts a phase that JSON or a config contains to a tuple."""
  try:
    row, fields = value
    return row, dict(fields)
  except (TypeError, ValueError) as error:
    raise ValueError("it must be (first row, {field: value, ...})") from error


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
  image_loss_weight: NonNegativeFloat = 1.0
  """Factor of the loss weights of image codes, in documents and neighbors."""
  text_share: Annotated[float, Field(ge=0, le=1)] = 0.7
  """Share of positions for text-only documents."""
  interleaved_share: Annotated[float, Field(ge=0, le=1)] = 0.0
  """Share of positions for interleaved documents. Pairs get the remaining positions."""
  base_documents: NonNegativeInt = 0
  """Above 0: documents of the base, the run of --init_from, are read: those in its workdir, or the
  sample in its bundle. Its held-out documents show how much the run forgets. 0: none are read."""
  base_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Share of training positions for documents of the base; needs `base_documents`."""
  phases: tuple[Annotated[tuple[PositiveInt, dict[str, Any]], BeforeValidator(_phase)], ...] = (
    dataclasses.field(default=(), hash=False)  # A section is hashed as a static argument.
  )
  """Changes of the mixture at given rows: ((N, {field: value, ...}), ...) sets fields from row N
  on, counted from 0, until a later phase sets them again. With B rows a step, row S x B is the
  first of step S + 1. The fields are those of this section that choose documents, neighbors, spans
  and loss weights, and `replay_share` of `instructions`; see docs/checkpoints.md."""
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
    rows = [row for row, _ in self.phases]
    if rows != sorted({*rows}):
      raise ValueError(f"phases begin at the rows {rows}, which must rise.")
    if unknown := {name for _, fields in self.phases for name in fields} - {*PHASED}:
      raise ValueError(f"phases set '{min(unknown)}'; they may set {', '.join(PHASED)}.")
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
      image_loss_weight=1.0,
      phases=(),
    )


Format = Literal["auto", "folder", "sidecars", "webdataset", "parquet", "text"]
Crop = Literal["center", "pad"]


def _plain(options: Any) -> Any:
  """Converts a ConfigDict to the values that JSON has, as stored settings contain them."""
  try:
    return json.loads(json.dumps(options.to_dict() if hasattr(options, "to_dict") else options))
  except TypeError as error:
    raise ValueError(f"its values must be plain: {error}") from error


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RawConfig:
  """Settings of `cm3leon prepare_data`."""

  source: str = ""
  """Source of the records: a folder, a file or a glob pattern, local or in a GCS bucket; or
  `FILE.py:FUNCTION`, a function of yours that yields records, in a file relative to the config
  (docs/data_formats.md). Only `cm3leon prepare_data` needs it."""
  options: Annotated[dict[str, Any], BeforeValidator(_plain)] = dataclasses.field(
    default_factory=dict,
    hash=False,  # A section is hashed as a static argument.
  )
  """Keyword arguments of the function that `source` names."""
  format: Format = "auto"
  """Format of the files. `auto` detects it from the file names."""
  licenses: tuple[str, ...] = ()
  """Keeps only records with one of these licenses. () keeps all records."""
  default_license: str = ""
  """License of records without a license field."""
  default_attribution: str = ""
  """Attribution of records without an attribution field."""
  allow_outside: bool = False
  """Whether records may name images outside the folder of their file. Use it only for records that
  you trust, because such records can name any file on the machine."""
  max_caption_characters: PositiveInt = 2_000
  """Maximum length of a caption in characters. Longer captions are rejected."""
  max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
  """Maximum share of rejected records. If more are rejected, the command stops. The share is
  checked at the end and, once 10,000 records have been read, after every shard."""
  resolution: Annotated[int, Field(ge=0, le=8192)] = 256
  """Side in pixels of the square to which all images are scaled. 0 means 48, or 24 if most images
  of the source are smaller."""
  crop: Crop = "center"
  """Treatment of images that are not square. `center` crops to a centered square, `pad` adds white
  borders."""
  crops: Annotated[int, Field(ge=-1, le=MOST_CROPS)] = 0
  """Number of random crops per training image, for sources of a few hundred images. Each crop
  becomes an additional pair with the caption and concept of its image. -1 chooses a number up to
  99 that yields about 3,200 pairs."""
  jpeg_quality: Annotated[int, Field(ge=0, le=95)] = 0
  """JPEG quality of the stored images. At 95, photographs take a quarter of the bytes of PNG. 0
  means lossless PNG."""
  heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
  """Share of concepts that are held out. The same share applies to texts and to interleaved
  documents. Records that have a field `split` are not counted."""
  num_threads: PositiveInt = 8
  """Number of images that are read, scaled and written in parallel."""


Backend = Literal["auto", "scann", "exact"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RetrievalConfig:
  """Settings that determine how neighbors are searched and selected."""

  clip: str = ""
  """Folder of a Hugging Face CLIP checkpoint that computes the embeddings, in bf16. Empty: the CLIP
  that the stage `clip` trained."""
  backend: Backend = "auto"
  """Search backend. `auto` is ScaNN for banks of at least 1,000 documents, and exact search for
  smaller banks."""
  max_candidates: PositiveInt = 64
  """Number of candidates that the search by text and the search by image each return; at least
  `kept_per_side`."""
  kept_per_side: PositiveInt = 2
  """Number of candidates kept from each of the two searches, by text and by image (paper: 2)."""
  max_similarity: Annotated[float, Field(ge=-1, le=1)] = 0.9
  """Largest cosine similarity of a candidate to the document, and to neighbors that are already
  selected. More similar candidates are skipped (paper: 0.9)."""
  min_similarity: Annotated[float, Field(ge=-1, le=1)] = -1.0
  """Smallest cosine similarity of a candidate to the document, or at inference to the caption. Less
  similar candidates are skipped. If all are skipped, the document has no neighbors. -1 skips no
  candidate, as in the paper."""
  index_rows: PositiveInt = 5_000_000
  """Number of documents in one ScaNN index. At an embedding width of 512, building took 8,250 bytes
  of memory per document (measured with 300,000 documents), and searching took 1,260 bytes. Fewer
  indices make the search cheaper."""
  train_documents: bool = True
  """Whether training documents can be neighbors. If False, only the split `bank` is searched."""
  query_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
  """Share of the caption's tokens that are dropped if a training document is the query (paper:
  20%). With `lexical_weight`, the same share of words is dropped instead, for CLIP and for the
  lexical part."""
  lexical_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Weight of shared words in the similarity of two captions or documents. Rare words count most.
  The remaining weight is for CLIP; 0 uses only CLIP, as in the paper. Words are sequences of
  letters and digits, so the weight is of little use for scripts without spaces between words. If
  the weight is above 0, the whole bank is embedded again when data is added."""
  lexical_width: PositiveInt = 256
  """Width that `lexical_weight` adds to embeddings. The lexical parts of captions without a shared
  word have a cosine similarity of mean 0 and standard deviation 1 / sqrt(lexical_width)."""

  def __post_init__(self) -> None:
    if self.max_candidates < self.kept_per_side:
      raise ValueError(
        f"max_candidates is {self.max_candidates}; it must be at least "
        f"kept_per_side = {self.kept_per_side}."
      )
