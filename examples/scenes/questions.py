"""Asks questions about scenes. The correct answers are known exactly.

The functions return None if a question would have several correct answers or none.
"""

from collections import Counter
import dataclasses
import itertools
import random

from examples.scenes import captions
from examples.scenes.options import COMMON
from examples.scenes.world import Scene, is_heldout_objects

NUMBER_WORDS = {1: "one", **captions.NUMBERS}

# {x}, {y}: objects without an article. {xs}: an object in the plural. {an_x}: an object with the
# indefinite article. {is}, {Is}: "is" or "are". {does}: "does" or "do". {relation}: e.g. "left of".
_COUNT = (
  "How many {xs} are there?",
  "How many {xs} do you see?",
  "How many {xs} does the image show?",
  "What is the number of {xs}?",
)
_COLOR = (
  "What color {is} the {x}?",
  "Which color {is} the {x}?",
  "What color {does} the {x} have?",
  "What is the color of the {x}?",
)
_EXISTS = (
  "{Is} there {an_x}?",
  "{Is} there {an_x} in the image?",
  "Do you see {an_x}?",
  "Does the image show {an_x}?",
)
_RELATION = (
  "What is {relation} the {y}?",
  "Which object is {relation} the {y}?",
  "What do you see {relation} the {y}?",
  "What stands {relation} the {y}?",
)


@dataclasses.dataclass(frozen=True)
class SceneQuestion:
  """Question about an image, with its answer."""

  question: str
  answer: str


def counts_of(scene: Scene) -> dict[str, int]:
  """Counts the objects of each name. The names are in the order of the places."""
  return dict(Counter(placed.object for placed in scene.objects))


def named(name: str, number: int) -> str:
  """Returns the singular or plural of a name, without an article: named("bell", 2) = "bells"."""
  return name if number == 1 else captions.plural(name)


def ask_count(scene: Scene, number: int, rng: random.Random) -> SceneQuestion | None:
  """Asks for the count of a common object whose count in the scene is `number`.

  "How many stars are there?" -> "two". Returns None if no common object has this count.
  """
  names = [x for x, count in counts_of(scene).items() if count == number and x in COMMON]
  if not names:
    return None
  name = rng.choice(names)
  return SceneQuestion(rng.choice(_COUNT).format(xs=captions.plural(name)), NUMBER_WORDS[number])


def ask_color(scene: Scene, rng: random.Random) -> SceneQuestion | None:
  """Asks for the color of an object; all objects with its name have this color.

  "What color is the bell?" -> "red". Returns None if the objects of every name have several colors.
  """
  colors: dict[str, set[str]] = {}
  for placed in scene.objects:
    colors.setdefault(placed.object, set()).add(placed.color)
  names = [name for name, result in colors.items() if len(result) == 1]
  if not names:
    return None
  name = rng.choice(names)
  number = counts_of(scene)[name]
  many = number > 1 or name in captions.PLURAL_WORDS
  verbs = {"is": "are" if many else "is", "does": "do" if many else "does"}
  question = rng.choice(_COLOR).format(x=named(name, number), **verbs)
  return SceneQuestion(question, *colors[name])


def ask_exists(scene: Scene, name: str, rng: random.Random) -> SceneQuestion:
  """Asks whether the scene shows an object with a given name: "Is there a cat?" -> "no"."""
  verb = "Are" if name in captions.PLURAL_WORDS else "Is"
  question = rng.choice(_EXISTS).format(an_x=captions.with_article(name), Is=verb)
  return SceneQuestion(question, "yes" if name in counts_of(scene) else "no")


def may_be_absent(scene: Scene, name: str) -> bool:
  """Returns whether training may ask "Is there a NAME?" about a scene without this object.

  Training must not ask this if the object and a shown object are a held-out pair: in training, the
  answer would always be "no", but in held-out scenes with both objects, it is "yes".
  """
  shown = counts_of(scene)
  if name in shown:
    return False
  return name not in COMMON or not any(is_heldout_objects(name, x) for x in shown if x in COMMON)


def ask_relation(scene: Scene, rng: random.Random) -> SceneQuestion | None:
  """Asks for the only object on one side of another object, whose name is unique in the scene.

  "What is left of the key?" -> "bell". A diagonally placed object is on two sides, e.g. left of the
  key and above it. Returns None if no side of a uniquely named object has exactly one object.
  """
  counts = counts_of(scene)
  known = []
  for y, relation in itertools.product(scene.objects, captions.RELATIONS):
    there = [x for x in scene.objects if relation in captions.relations(x.place, y.place)]
    if counts[y.object] == 1 and len(there) == 1:
      known.append((relation, y.object, there[0].object))
  if not known:
    return None
  relation, name, answer = rng.choice(known)
  phrase = rng.choice(captions.RELATIONS[relation])
  return SceneQuestion(rng.choice(_RELATION).format(relation=phrase, y=name), answer)
