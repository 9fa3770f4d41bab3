"""Defines the options of the source `records`, and names of objects, colors and categories.

A scene shows icons of Material Design Icons on a grid of 2 x 2 places. Each icon has one color.
"""

import difflib
import pathlib
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config.build import STRICT

# Colors in RGB. Any two colors have a distance of at least 100. The distance of a color from any
# mixture of another color with white is at least 89. Such mixtures occur at antialiased edges.
COLORS = {
  "red": (220, 0, 30),
  "orange": (255, 130, 0),
  "yellow": (250, 230, 0),
  "green": (0, 150, 50),
  "cyan": (0, 190, 225),
  "blue": (0, 50, 230),
  "purple": (150, 0, 190),
  "black": (0, 0, 0),
}

# Name in captions -> icon. For any two icons, the intersection over union of the ink is at most
# 0.67.
COMMON = {
  "airplane": "airplane",
  "anchor": "anchor",
  "bell": "bell",
  "bicycle": "bicycle",
  "bone": "bone",
  "butterfly": "butterfly",
  "cactus": "cactus",
  "camera": "camera",
  "carrot": "carrot",
  "cat": "cat",
  "cherries": "fruit_cherries",
  "crown": "crown",
  "duck": "duck",
  "fish": "fish",
  "flag": "flag",
  "gift": "gift",
  "glasses": "glasses",
  "guitar": "guitar_acoustic",
  "heart": "heart",
  "key": "key",
  "leaf": "leaf",
  "moon": "moon_waning_crescent",
  "mushroom": "mushroom",
  "paw": "paw",
  "pear": "fruit_pear",
  "pencil": "pencil",
  "phone": "phone",
  "rabbit": "rabbit",
  "rocket": "rocket",
  "sailboat": "sail_boat",
  "scissors": "content_cut",
  "skull": "skull",
  "snail": "snail",
  "snowflake": "snowflake",
  "star": "star",
  "trophy": "trophy",
  "truck": "truck",
  "turtle": "turtle",
  "umbrella": "umbrella",
  "wrench": "wrench",
}

# The rare icons cover 15 to 70% of a cell. Each has an intersection over union below 0.79 with
# every other rare or common icon. Outlines, letters, arrows and brands are excluded. An icon whose
# name extends another name (`bee_flower`) is included only if no other name has that extension.
_RARE_FILE = pathlib.Path(__file__).parent / "data" / "rare_icons.txt"
RARE = {icon.replace("_", " "): icon for icon in _RARE_FILE.read_text("ascii").split()}

CATEGORIES = (
  "single_object",
  "colors",
  "counting",
  "two_object",
  "position",
  "color_attr",
  "rare",
)
TWO_OBJECTS = ("two_object", "position", "color_attr")
Style = Literal["filled", "outlined"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ScenesConfig:
  """Scenes that `source.records` yields; the values of `config.raw.options`."""

  train: PositiveInt = 20_000
  """Number of training scenes."""
  heldout: PositiveInt = 1_200
  """Number of held-out scenes. They are spread equally over the categories, and in each category
  over the reasons why scenes are held out."""
  bank: NonNegativeInt = 0
  """Number of one-object scenes that are only in the bank: they can be retrieved, and are never
  trained on. Training and held-out scenes never show these objects alone in these colors."""
  objects: tuple[str, ...] = tuple(COMMON)
  """Names of the common objects that scenes show."""
  colors: tuple[str, ...] = tuple(COLORS)
  """Names of the colors that objects have."""
  categories: tuple[str, ...] = CATEGORIES
  """Categories of captions."""
  shares: tuple[Annotated[float, Field(gt=0)], ...] = ()
  """Relative share of each category in the training scenes. Empty means equal shares."""
  rare_objects: Annotated[int, Field(ge=0, le=len(RARE))] = 1_000
  """Number of rare objects for the category `rare`. A fifth of them never occurs in training."""
  rare_places: Annotated[int, Field(ge=1, le=4)] = 1
  """Number of places at which training shows each rare object that is not held out. The bank shows
  these objects first at one place. With 4, training documents therefore often have a neighbor that
  shows their object at another place, and the decoder learns to move it."""
  style: Style = "filled"
  """Style in which objects are drawn. `filled` draws the icons unchanged; `outlined` draws only
  the edges of their ink. Captions do not name the style. The judge of the configs knows only
  `filled`."""
  seed: NonNegativeInt = 0
  """Seed of the scenes and captions."""

  def __post_init__(self) -> None:
    for field, kind, known in (
      ("objects", "object", COMMON),
      ("colors", "color", COLORS),
      ("categories", "category", CATEGORIES),
    ):
      _check_names(field, kind, getattr(self, field), tuple(known))
    if self.shares and len(self.shares) != len(self.categories):
      raise ValueError(
        f"shares has {len(self.shares)} numbers; it must have one for each of the "
        f"{len(self.categories)} categories, or none."
      )
    for category in self.categories:
      if needs := _lacking(self, category):
        raise ValueError(f"category '{category}' has no scene; it needs {needs}.")


def _lacking(config: ScenesConfig, category: str) -> str:
  """Returns what the config lacks for a category, or "" if the category has scenes."""
  two_objects, two_colors = len(config.objects) > 1, len(config.colors) > 1
  match category:
    case "rare" if not config.rare_objects:
      return "rare_objects of at least 1"
    case "two_object" | "position" if not two_objects:
      return "two objects"
    case "color_attr" if not (two_objects and two_colors):
      return "two objects and two colors"
  return ""


def _check_names(field: str, kind: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
  """Raises ValueError if `names` is empty, or if a name is unknown or repeated."""
  if not names:
    raise ValueError(f"{field} is empty; it must name at least one {kind}.")
  for name in names:
    if name not in known:
      close = difflib.get_close_matches(name, known, 1)
      hint = f"did you mean '{close[0]}'?" if close else f"it must be one of {', '.join(known)}."
      raise ValueError(f"{field} has the unknown {kind} '{name}'; {hint}")
  if len(set(names)) < len(names):
    raise ValueError(f"{field} names a {kind} twice; each {kind} may occur only once.")
