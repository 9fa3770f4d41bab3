"""Defines the world of `scenes`: its objects, colors and places, its scenes, and their splits.

A scene shows icons of Material Design Icons on a grid of 2 x 2 places. Each icon has one color.
`drawings` renders scenes, `captions` describes them, and `source` makes records of them.
"""

from collections.abc import Iterable
import dataclasses
import functools
import itertools
import math
from typing import Self

from cm3leon_jax.data.sources.splits import fraction
from examples.scenes.options import COLORS, COMMON, RARE, TWO_OBJECTS, ScenesConfig

ICONS = {**RARE, **COMMON}

PLACES = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("scene", "pair", "objects", "rare")  # Reasons why a scene is held out.

HELDOUT_SCENES = 0.1  # Held-out share of scenes whose colored objects and pairs occur in training.
HELDOUT_OBJECTS = 0.05  # Held-out share of the unordered pairs of common objects.
HELDOUT_RARE = 0.2  # Held-out share of the rare objects.
# Common object -> the color in which training never shows it. Each color has equally many objects.
_ordered = sorted(COMMON, key=lambda name: fraction("scenes/pair/" + name))
HELDOUT_COLOR = dict(zip(_ordered, itertools.cycle(COLORS)))


@functools.cache
def rare_color(name: str) -> str:
  """Returns the color in which training and evaluation show a rare object.

  Training shows the object only in this color, at `rare_places`. If the object is held out,
  evaluation shows it in this color at all places. The bank shows it in the other colors.
  """
  return min(COLORS, key=lambda color: fraction(f"scenes/color/{name}/{color}"))


@functools.cache
def bank_color(name: str) -> str:
  """Returns the color in which only the bank shows a common object alone."""
  known = [color for color in COLORS if color != HELDOUT_COLOR[name]]
  return min(known, key=lambda color: fraction(f"scenes/bank/{name}/{color}"))


@functools.cache
def rare_place(name: str) -> str:
  """Returns the first place at which training and the bank show a rare object."""
  return min(PLACES, key=lambda place: fraction(f"scenes/place/{name}/{place}"))


def rare_places(name: str, count: int) -> tuple[str, ...]:
  """Returns the places at which training shows a rare object: `rare_place`, and those after it."""
  first = PLACES.index(rare_place(name))
  return tuple(PLACES[(first + i) % len(PLACES)] for i in range(count))


@functools.cache
def is_heldout_objects(a: str, b: str) -> bool:
  """Returns whether training never shows the common objects `a` and `b` in one scene."""
  return fraction("scenes/objects/" + "/".join(sorted((a, b)))) < HELDOUT_OBJECTS


@functools.cache
def is_heldout_rare(name: str) -> bool:
  """Returns whether training never shows a rare object."""
  return fraction("scenes/rare/" + name) < HELDOUT_RARE


@dataclasses.dataclass(frozen=True)
class Placed:
  """An object, its color and its place, by name."""

  object: str
  color: str
  place: str

  def __str__(self) -> str:
    return f"{self.color} {self.object} {self.place}"


@dataclasses.dataclass(frozen=True)
class Scene:
  """Objects at different places, in the order of PLACES.

  Scene((Placed("bell", "red", "top left"), Placed("key", "blue", "top right"))).facts_key
    = "blue key top right, red bell top left"
  """

  objects: tuple[Placed, ...]

  @property
  def facts_key(self) -> str:
    """Canonical text of all facts. Equal images have equal texts."""
    return ", ".join(sorted(map(str, self.objects)))

  @property
  def drawings_key(self) -> str:
    """Canonical text of the distinct objects with their colors. It has no places and no counts."""
    return ", ".join(sorted({f"{placed.color} {placed.object}" for placed in self.objects}))

  @classmethod
  def parse(cls, facts_key: str) -> Self:
    """Parses the text of `facts_key`."""
    objects = []
    for text in facts_key.split(", "):
      color, *name, vertical, horizontal = text.split(" ")
      objects.append(Placed(" ".join(name), color, f"{vertical} {horizontal}"))
    return cls.of(objects)

  @classmethod
  def of(cls, objects: Iterable[Placed]) -> Self:
    """Makes a scene from objects, which may be in any order."""
    return cls(tuple(sorted(objects, key=lambda placed: PLACES.index(placed.place))))


def split_of_scene(scene: Scene, places: int = 1) -> str:
  """Returns "train", "bank", or the first of these reasons why a scene is held out.

  - "rare": it shows a rare object that training never shows, in a color that the bank never shows.
  - "pair": it shows a common object in its held-out color.
  - "objects": it shows two common objects that training never shows together.
  - "scene": training shows its objects, colors and pairs, but not this combination.

  "bank" means that only the bank, which is never trained on, may show the scene: a rare object in a
  color or at a place in which training does not show it, or a single common object in its
  `bank_color`. `places` is `ScenesConfig.rare_places`.
  """
  names = [placed.object for placed in scene.objects]
  rare = [placed for placed in scene.objects if placed.object not in COMMON]
  if any(placed.color != rare_color(placed.object) for placed in rare):
    return "bank"
  if any(is_heldout_rare(placed.object) for placed in rare):
    return "rare"
  if rare:
    known = all(placed.place in rare_places(placed.object, places) for placed in rare)
    return "train" if known else "bank"
  if any(HELDOUT_COLOR.get(placed.object) == placed.color for placed in scene.objects):
    return "pair"
  if len(scene.objects) == 1 and scene.objects[0].color == bank_color(scene.objects[0].object):
    return "bank"
  common = sorted({name for name in names if name in COMMON})
  if any(is_heldout_objects(a, b) for a, b in itertools.combinations(common, 2)):
    return "objects"
  return "scene" if fraction("scenes/scene/" + scene.facts_key) < HELDOUT_SCENES else "train"


@functools.cache
def rare_objects(config: ScenesConfig) -> tuple[str, ...]:
  """Returns the rare objects of a config. A larger `rare_objects` only appends objects."""
  ordered = sorted(RARE, key=lambda name: fraction("scenes/order/" + name))
  return tuple(ordered[: config.rare_objects])


@functools.cache
def bank_scenes(config: ScenesConfig) -> tuple[Scene, ...]:
  """Returns the distinct one-object scenes that only the bank may show, the most useful first.

  1. Each common object in its `bank_color`, at all four places.
  2. Each trained rare object at `rare_place`, and each held-out rare object at all four places.
     Each of these objects has one color.
  3. Rare objects at more places and in more colors.

  The first scenes of an object therefore differ only in the place, so only the place determines
  which of them is nearest to a caption.
  """
  order = [
    (-1, Scene((Placed(name, bank_color(name), place),)))
    for name in config.objects
    if bank_color(name) in config.colors
    for place in PLACES
  ]
  for name in rare_objects(config):
    colors = [color for color in config.colors if color != rare_color(name)]
    colors.sort(key=lambda color: fraction(f"scenes/color/{name}/{color}"))
    first = PLACES.index(rare_place(name))
    for i in range(len(PLACES) * len(colors)):
      turn, place = divmod(i, len(PLACES))
      placed = Placed(name, colors[turn], PLACES[(first + place) % len(PLACES)])
      order.append((i if turn or not is_heldout_rare(name) else 0, Scene((placed,))))
  return tuple(scene for _, scene in sorted(order, key=lambda entry: entry[0]))


# Combinations of places: for 2 to 4 equal objects, and for two different objects.
_SETS = tuple(p for n in (2, 3, 4) for p in itertools.combinations(PLACES, n))
_ORDERED = tuple(itertools.permutations(PLACES, 2))


@functools.cache
def _parts(config: ScenesConfig, category: str) -> tuple[tuple, ...]:
  """Returns the names, colors and places that are combined into the scenes of a category."""
  colors = tuple(config.colors)
  if category in TWO_OBJECTS:
    both = tuple(itertools.product(colors, repeat=2))
    if category == "color_attr":
      both = tuple((a, b) for a, b in both if a != b)
    return tuple(itertools.combinations(sorted(config.objects), 2)), both, _ORDERED
  names = rare_objects(config) if category == "rare" else tuple(config.objects)
  return names, colors, _SETS if category == "counting" else PLACES


def number_of_scenes_of(config: ScenesConfig, category: str) -> int:
  """Counts the distinct scenes of a category, in all splits."""
  return math.prod(map(len, _parts(config, category)))


def scene_at(config: ScenesConfig, category: str, index: int) -> Scene:
  """Returns scene `index` of a category. All scenes are distinct.

  `index` must be below `number_of_scenes_of`.
  """
  chosen = []
  for choices in _parts(config, category):
    index, i = divmod(index, len(choices))
    chosen.append(choices[i])
  names, colors, places = chosen
  if category in TWO_OBJECTS:
    return Scene.of(map(Placed, names, colors, places))
  places = places if category == "counting" else (places,)
  return Scene(tuple(Placed(names, colors, place) for place in places))


def number_of_scenes(config: ScenesConfig) -> int:
  """Counts the distinct scenes of the world, in all splits.

  Captions of `single_object` and `colors` describe the same scenes. Captions of `two_object` and
  `position` also describe the same scenes, which include the scenes of `color_attr`.
  """
  of = {category: number_of_scenes_of(config, category) for category in config.categories}
  alike = (("single_object", "colors"), TWO_OBJECTS, ("counting",), ("rare",))
  return sum(max(of.get(category, 0) for category in group) for group in alike)
