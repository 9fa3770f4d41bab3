"""What ingestion asks of a source that draws its images itself."""

from collections.abc import Iterable
import dataclasses
from typing import Any, Protocol

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources.formats import SourcePart
from cm3leon_jax.data.sources.records import RawPair


@dataclasses.dataclass(frozen=True)
class FactLeakReport:
  """What training shows of what is held out, by the facts of the images.

  Attributes:
    heldout, train: number of images.
    leaked: number of held-out images that leaked, by the reason why they are held out.
    first: sentences on the first of them.
  """

  heldout: int
  train: int
  leaked: dict[str, int]
  first: list[str]


class DrawnSource(Protocol):
  """A source whose records and images are computed. It is pickled to the workers that ingest it."""

  @property
  def name(self) -> str:
    """Value of `raw.source`; also the kind of its parts."""

  def identity(self) -> dict[str, Any]:
    """Returns what its records and images depend on, beside the part and section `raw`."""

  def parts(self, licenses: tuple[str, ...], resolution: int) -> list[SourcePart]:
    """Splits the source into parts, one for each raw shard.

    Raises:
      UserError: `licenses` lack that of the drawings, or it cannot draw at this resolution.
    """

  def read(self, part: SourcePart) -> Iterable[RawPair]:
    """Returns the records of a part, whose images `load` draws."""

  def load(self, image: str, resolution: int) -> np.ndarray:
    """Draws the image of a record: [H, W, 3] uint8."""

  def number_of(self, pair: RawPair) -> str:
    """Returns the name of the number that counts a record."""

  def numbers(self) -> dict[str, int]:
    """Returns numbers of the whole source."""

  def leaks(self, folder: epath.PathLike) -> FactLeakReport:
    """Compares the facts of the splits in a raw folder.

    Drawn images of both splits are alike by design, so a comparison of pixels says nothing.
    """


def check_license(licenses: tuple[str, ...], given: str, name: str) -> None:
  """Raises UserError if `licenses`, of the config, lack the one of drawings."""
  if licenses and given not in licenses:
    raise UserError(
      f"config.raw.licenses is {licenses}; the drawings of {name} are under {given}: add it."
    )
