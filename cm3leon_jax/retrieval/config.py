"""Config section of the choice of neighbors."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT

Backend = Literal["auto", "scann", "exact"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class RetrievalConfig:
  """How neighbors are chosen."""

  clip: str = ""
  """Folder of a Hugging Face CLIP checkpoint that embeds (in bf16); empty: the run's own CLIP, of
  the stage `clip`."""
  backend: Backend = "auto"
  """Search: `auto` is ScaNN for banks of 1,000 documents and more, exact below."""
  max_candidates: PositiveInt = 64
  """Length of the list of candidates of each side; at least `kept_per_side`."""
  kept_per_side: PositiveInt = 2
  """Number of candidates kept from the text side and from the image side (paper: 2 and 2)."""
  max_similarity: Annotated[float, Field(ge=-1, le=1)] = 0.9
  """Cosine above which a candidate is skipped: its similarity to the document, or to a candidate
  that is already kept (paper: 0.9)."""
  min_similarity: Annotated[float, Field(ge=-1, le=1)] = -1.0
  """Cosine to the document below which a candidate is skipped, in use to the caption. A document
  without a candidate stands alone. -1: none is skipped, as in the paper."""
  index_rows: PositiveInt = 5_000_000
  """Documents of one ScaNN index. Building took 8,250 bytes a document at an embedding width of 512
  (measured at 300,000 documents), searching 1,260; fewer indices make the search cheaper."""
  train_documents: bool = True
  """Whether training documents can be neighbors, too; False: only those of the split `bank`."""
  query_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
  """Share of the caption's tokens that is left out when a training document is the query (paper:
  20%); with `lexical_weight` the same share of its words, for both parts of the query."""
  lexical_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Weight of equal words, rare ones most, in the similarity of two captions or documents; the rest
  is CLIP's. 0: CLIP alone, as in the paper. Words are runs of letters and digits: of little use for
  scripts without spaces between words. Added data embeds the whole bank again."""
  lexical_width: PositiveInt = 256
  """Width that `lexical_weight` adds to embeddings. Captions without a common word have a lexical
  cosine of mean 0 and standard deviation 1 / sqrt(lexical_width)."""

  def __post_init__(self) -> None:
    if self.max_candidates < self.kept_per_side:
      raise ValueError(
        f"max_candidates is {self.max_candidates}; it must be at least "
        f"kept_per_side = {self.kept_per_side}."
      )
