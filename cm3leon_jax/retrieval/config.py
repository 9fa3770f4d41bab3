"""Defines the config section of retrieval: embeddings, search and selection of neighbors."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

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
