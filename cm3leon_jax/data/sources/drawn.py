"""Defines the interface between `prepare_data` and sources that draw their images."""

from collections.abc import Iterable
import dataclasses
import importlib
from types import ModuleType
from typing import Any, Protocol

from etils import epath
import numpy as np

from cm3leon_jax import extras
from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources.formats import SourcePart
from cm3leon_jax.data.sources.records import RawPair


@dataclasses.dataclass(frozen=True)
class FactLeakReport:
  """Result of comparing the facts of held-out images with the facts of training images.

  Attributes:
    leaked: number of leaked held-out images by the reason why the images are held out.
    first: a sentence about each of the first leaked images.
  """

  heldout: int
  train: int
  leaked: dict[str, int]
  first: list[str]


class DrawnSource(Protocol):
  """A source that computes its records and images. Must be picklable for the workers."""

  @property
  def name(self) -> str:
    """Returns the value of `raw.source`, which is also the kind of the parts."""

  def identity(self) -> dict[str, Any]:
    """Returns all values on which records and images depend, except the part and section `raw`."""

  def parts(self, licenses: tuple[str, ...], resolution: int) -> list[SourcePart]:
    """Splits the source into parts, one per raw shard.

    Raises:
      UserError: `licenses` lacks the license of the drawings, or the source cannot draw at this
        resolution.
    """

  def read(self, part: SourcePart) -> Iterable[RawPair]:
    """Returns the records of a part. Their images are inputs of `load`."""

  def load(self, image: str, resolution: int) -> np.ndarray:
    """Draws the image of a record: [H, W, 3] uint8."""

  def number_of(self, pair: RawPair) -> str:
    """Returns the name of the counter in the summary that a record increments."""

  def numbers(self) -> dict[str, int]:
    """Returns numbers that describe the whole source, for the summary."""

  def leaks(self, folder: epath.PathLike) -> FactLeakReport:
    """Compares the facts of held-out images with those of training images in a raw folder.

    A comparison of pixels would not help, because drawn images of both splits are similar.
    """


def load_drawings(source: str, module: str) -> ModuleType:
  """Imports a module with the drawings of a source. Raises UserError if it is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f"the drawings of '{source}' are not installed ({error}): {extras.install('demo')}."
    ) from error


def check_license(licenses: tuple[str, ...], given: str, name: str) -> None:
  """Raises UserError if `licenses` of the config lack `given`, the license of the drawings."""
  if licenses and given not in licenses:
    raise UserError(
      f"config.raw.licenses is {licenses}, but the license of {name}'s drawings is {given}: add it."
    )
