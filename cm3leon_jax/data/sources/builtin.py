"""Sources in installed packages: drawings of OpenMoji, scenes of icons, texts from docstrings."""

from collections.abc import Iterator
import importlib

from cm3leon_jax import extras
from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources import docstrings
from cm3leon_jax.data.sources.formats import SourcePart
from cm3leon_jax.data.sources.records import RawPair, RawText
from cm3leon_jax.scenes.world import ScenesConfig, fraction

OPENMOJI, SCENES = "openmoji", "scenes"  # Values of `raw.source`.
MODULES = {OPENMOJI: "cm3leon_jax.data.sources.openmoji", SCENES: "cm3leon_jax.scenes.source"}
DOCSTRINGS = "docstrings"


def split_of(name: str, heldout_fraction: float) -> str:
  """Returns the split of a concept or module, a function of its name alone."""
  return "heldout" if fraction("split:" + name) < heldout_fraction else "train"


def drawings_of(source: str):
  """Imports the module of OPENMOJI or SCENES, whose packages are an extra.

  Raises:
    UserError: a package is absent.
  """
  try:
    if source == SCENES:
      importlib.import_module("fonticon_mdi7")  # Its module imports it at the first icon.
    return importlib.import_module(MODULES[source])
  except ImportError as error:
    raise UserError(
      f"config.raw.source is '{source}', whose drawings are not installed ({error}): "
      f"{extras.install('demo')}."
    ) from error


def parts(
  source: str, licenses: tuple[str, ...], scenes: ScenesConfig, resolution: int, max_texts: int
) -> list[SourcePart]:
  """Splits OPENMOJI or SCENES into parts; the texts of OPENMOJI are in its only part.

  Raises:
    UserError: `licenses` lack that of the drawings, or the scenes cannot be split.
  """
  drawings = drawings_of(source)
  if licenses and drawings.LICENSE not in licenses:
    raise UserError(
      f"config.raw.licenses is {licenses}; the drawings of {drawings.NAME} are under "
      f"{drawings.LICENSE}: add it."
    )
  if source == OPENMOJI:
    return [SourcePart(OPENMOJI, (drawings.source(),), 0)]
  texts = [SourcePart(DOCSTRINGS, (), 0)] if max_texts else []
  return drawings.parts(scenes, resolution) + texts


def openmoji_pairs(
  resolution: int, heldout_fraction: float, num_threads: int
) -> tuple[list[RawPair], int]:
  """Lists OpenMoji's drawings, near duplicates in one concept, and counts those without a name."""
  openmoji = drawings_of(OPENMOJI)
  drawings, nameless = openmoji.drawings()
  drawings = openmoji.unite_concepts(drawings, resolution, num_threads)
  origin = (openmoji.source(), openmoji.LICENSE, openmoji.ATTRIBUTION)
  pairs = []
  for d in drawings:
    group = f"openmoji/{openmoji.STYLE}/{d.concept}"
    split = split_of(d.concept, heldout_fraction)
    key = f"openmoji/{d.code}"
    pairs.append(RawPair(key, d.path, d.caption, *origin, group, split, d.concept))
  return pairs, nameless


def docstring_texts(max_texts: int, heldout_fraction: float) -> Iterator[RawText]:
  """Yields texts from docstrings; a module lies wholly in one split."""
  for piece in docstrings.pieces(max_texts):
    m, split = piece.module, split_of(piece.module.name, heldout_fraction)
    yield RawText(piece.key, piece.text, m.source, m.license, m.attribution, split)
