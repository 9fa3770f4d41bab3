"""Sources in installed packages: drawings of OpenMoji, texts from docstrings."""

from collections.abc import Iterator
import importlib
from types import ModuleType

from cm3leon_jax import extras
from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources import docstrings
from cm3leon_jax.data.sources.drawn import check_license
from cm3leon_jax.data.sources.formats import SourcePart
from cm3leon_jax.data.sources.records import RawPair, RawText
from cm3leon_jax.data.sources.splits import split_of

OPENMOJI = "openmoji"  # Value of `raw.source`.
DOCSTRINGS = "docstrings"


def load_drawings(source: str, *modules: str) -> ModuleType:
  """Imports modules that need the packages of an extra, and returns the last one.

  Raises:
    UserError: a package is absent.
  """
  try:
    return [importlib.import_module(module) for module in modules][-1]
  except ImportError as error:
    raise UserError(
      f"config.raw.source is '{source}', whose drawings are not installed ({error}): "
      f"{extras.install('demo')}."
    ) from error


def openmoji_drawings() -> ModuleType:
  """Imports the drawings of OpenMoji; raises UserError if they are not installed."""
  return load_drawings(OPENMOJI, "cm3leon_jax.data.sources.openmoji")


def openmoji_parts(licenses: tuple[str, ...]) -> list[SourcePart]:
  """Returns the only part of OPENMOJI, which also has the texts.

  Raises:
    UserError: `licenses` lack that of the drawings.
  """
  drawings = openmoji_drawings()
  check_license(licenses, drawings.LICENSE, drawings.NAME)
  return [SourcePart(OPENMOJI, (drawings.source(),), 0)]


def openmoji_pairs(
  resolution: int, heldout_fraction: float, num_threads: int
) -> tuple[list[RawPair], int]:
  """Lists OpenMoji's drawings, near duplicates in one concept, and counts those without a name."""
  module = openmoji_drawings()
  drawings, nameless = module.drawings()
  drawings = module.unite_concepts(drawings, resolution, num_threads)
  origin = (module.source(), module.LICENSE, module.ATTRIBUTION)
  pairs = []
  for d in drawings:
    group = f"openmoji/{module.STYLE}/{d.concept}"
    split = split_of(d.concept, heldout_fraction)
    key = f"openmoji/{d.code}"
    pairs.append(RawPair(key, d.path, d.caption, *origin, group, split, d.concept))
  return pairs, nameless


def docstring_texts(max_texts: int, heldout_fraction: float) -> Iterator[RawText]:
  """Yields texts from docstrings; a module lies wholly in one split."""
  for piece in docstrings.pieces(max_texts):
    m, split = piece.module, split_of(piece.module.name, heldout_fraction)
    yield RawText(piece.key, piece.text, m.source, m.license, m.attribution, split)
