"""What ingestion asks of a source that draws its images itself, such as `scenes`."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources.formats import SourcePart
from cm3leon_jax.data.sources.records import RawPair


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


def check_license(licenses: tuple[str, ...], given: str, name: str) -> None:
  """Raises UserError if `licenses`, of the config, lack the one of drawings."""
  if licenses and given not in licenses:
    raise UserError(
      f"config.raw.licenses is {licenses}; the drawings of {name} are under {given}: add it."
    )
