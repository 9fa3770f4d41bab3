"""Writes captions in GenEval's categories (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513).

A description is a caption with its claims. The claims have the layout of GenEval's metadata, with
the lists `include` and `exclude` (docs/evaluation.md).
"""

import dataclasses
import random

from examples.scenes.world import PLACES, Placed, Scene

PLURALS = {
  "butterfly": "butterflies",
  "cactus": "cacti",
  "cherries": "cherries",
  "fish": "fish",
  "glasses": "glasses",
  "leaf": "leaves",
  "scissors": "scissors",
  "trophy": "trophies",
  "wrench": "wrenches",
}
PLURAL_WORDS = ("cherries", "glasses", "scissors")  # Plurals that name one object, without article.
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {
  "left of": ("left of", "to the left of"),
  "right of": ("right of", "to the right of"),
  "above": ("above", "over"),
  "below": ("below", "under"),
}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# {x}: an object with its article. {is}: "is" or "are". {stands}: "stands" or "stand". {place}: e.g.
# "top left".
_PLACED = (
  "{x} at the {place}",
  "{x} in the {place} corner",
  "there {is} {x} in the {place} corner",
  "at the {place} {stands} {x}",
  "an image with {x} at the {place}",
)
_ALONE = (
  "{x}",
  "there {is} {x}",
  "an image of {x}",
  "we see {x}",
  "{x} on white",
)
# {x} and {y}: two objects.
_TOGETHER = (
  "{x} and {y}",
  "there {is} {x} and {y}",
  "an image of {x} and {y}",
  "{x} together with {y}",
  "we see {x} and also {y}",
)
_RELATED = (
  "{x} {relation} {y}",
  "there {is} {x} {relation} {y}",
  "an image of {x} {relation} {y}",
  "{relation} {y} {stands} {x}",
  "we see {x} {relation} {y}",
)


@dataclasses.dataclass(frozen=True)
class Description:
  """Caption, with its claims in GenEval's layout."""

  caption: str
  include: list[dict]
  exclude: list[dict]


def plural(name: str) -> str:
  """Returns the plural of a common object."""
  return PLURALS.get(name, name + "s")


def with_article(name: str, color: str = "") -> str:
  """Puts the indefinite article before an object: "a bell", "an orange bell", "red glasses"."""
  words = f"{color} {name}".strip()
  if name in PLURAL_WORDS:
    return words
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe_plainly(scene: Scene) -> Description:
  """Describes a one-object scene, always in the wording "a red bell at the top left"."""
  (placed,) = scene.objects
  return _one(placed, placed.color, _PLACED[0])


def _fill(template: str, first: str, **words: str) -> str:
  """Fills a template. The verb agrees with the object `first`."""
  many = first in PLURAL_WORDS
  verbs = {"is": "are" if many else "is", "stands": "stand" if many else "stands"}
  return template.format(**verbs, **words)


def describe(category: str, scene: Scene, rng: random.Random) -> Description:
  """Describes a scene of a category in one of several wordings.

  describe("position", <red bell top left, blue key top right>, rng) may return
    caption = "an image of a key to the right of a bell"
    include = [{"class": "bell", "count": 1},
               {"class": "key", "count": 1, "position": ["right of", 0]}]
  """
  if category == "counting":
    return _count(scene, rng)
  if len(scene.objects) == 2:
    first, second = rng.sample(scene.objects, 2)
    return _two(category, first, second, rng)
  (placed,) = scene.objects
  return _one(placed, "" if category == "single_object" else placed.color, rng.choice(_PLACED))


def _one(placed: Placed, color: str, template: str) -> Description:
  """Describes one object at its place. If `color` is "", the caption names no color."""
  thing = with_article(placed.object, color)
  caption = _fill(template, placed.object, x=thing, place=placed.place)
  claim = {"class": placed.object, "count": 1, **({"color": color} if color else {})}
  return Description(caption, [{**claim, "place": placed.place}], [])


def _count(scene: Scene, rng: random.Random) -> Description:
  """Describes how many equal objects there are. Half of the captions also name the color."""
  placed, number = scene.objects[0], len(scene.objects)
  color = placed.color if rng.random() < 0.5 else ""
  words = [NUMBERS[number], *([color] if color else []), plural(placed.object)]
  caption = rng.choice(_ALONE).format(x=" ".join(words), **{"is": "are"})
  claim = {"class": placed.object, "count": number, **({"color": color} if color else {})}
  return Description(caption, [claim], [{"class": placed.object, "count": number + 1}])


def _two(category: str, first: Placed, second: Placed, rng: random.Random) -> Description:
  """Describes two objects and, for `position`, where `first` is relative to `second`."""
  colored = category == "color_attr" or (category == "position" and rng.random() < 0.5)
  words, claims = [], []
  for placed in (first, second):
    color = placed.color if colored else ""
    words.append(with_article(placed.object, color))
    claims.append({"class": placed.object, "count": 1, **({"color": color} if color else {})})
  if category != "position":
    return Description(
      _fill(rng.choice(_TOGETHER), first.object, x=words[0], y=words[1]), claims, []
    )
  relation = rng.choice(relations(first.place, second.place))
  phrase = rng.choice(RELATIONS[relation])
  caption = _fill(rng.choice(_RELATED), first.object, x=words[0], y=words[1], relation=phrase)
  claims[0]["position"] = [relation, 0]
  return Description(caption, claims[::-1], [])


def relations(place: str, other: str) -> list[str]:
  """Lists the relations of `place` to `other`.

  relations("top left", "top right") = ["left of"]
  """
  (row, column), (other_row, other_column) = (divmod(PLACES.index(p), 2) for p in (place, other))
  result = []
  if column != other_column:
    result.append("left of" if column < other_column else "right of")
  if row != other_row:
    result.append("above" if row < other_row else "below")
  return result
