"""Edits scenes by instructions: recolor, remove, mirror and add objects.

The facts of an edit are clauses in the layout of `facts.check` (docs/evaluation.md):

- `include`: everything that the result shows.
- `changed`: what must be true of the objects that the instruction names.
- `touched`: the names of these objects.
- `kept`: facts that the instruction does not touch, each with some of `class`, `color`, `place`.

An edit function returns None if the edit is impossible in the scene or would not change it.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import random

from examples.scenes.captions import RELATIONS, relations, with_article
from examples.scenes.options import ScenesConfig
from examples.scenes.questions import counts_of, named
from examples.scenes.world import PLACES, Placed, Scene

ALL_FIELDS = ("object", "color", "place")

# {x}: one or more objects without an article. {an_x}: an object with its article and color.
# {where}: a place or a side.
_RECOLOR = (
  "Make the {x} {color}",
  "Paint the {x} {color}",
  "Turn the {x} {color}",
  "Change the color of the {x} to {color}",
)
_REMOVE = ("Remove the {x}", "Erase the {x}", "Delete the {x}", "Take away the {x}")
_MIRROR = {
  "across": (
    "Mirror the image",
    "Mirror the image from left to right",
    "Swap the left half and the right half",
    "Exchange the left and the right half of the image",
    "Move what is on the left to the right, and what is on the right to the left",
  ),
  "down": (
    "Mirror the image from top to bottom",
    "Swap the top half and the bottom half",
    "Exchange the top and the bottom half of the image",
    "Move what is at the top to the bottom, and what is at the bottom to the top",
  ),
}
_ADD = ("Add {an_x} {where}", "Draw {an_x} {where}", "Put {an_x} {where}")
_WHERE = ("at the {place}", "in the {place} corner")


@dataclasses.dataclass(frozen=True)
class SceneEdit:
  """Instruction, the scene that it requests, and the facts that a judge checks."""

  instruction: str
  target: Scene
  include: list[dict]
  changed: list[dict]
  touched: list[str]
  kept: list[dict]


def facts_of(objects: Iterable[Placed], fields: Sequence[str] = ALL_FIELDS) -> list[dict]:
  """Lists a fact for each object, with the chosen fields.

  facts_of([Placed("bell", "red", "top left")], ("object", "color")) =
    [{"class": "bell", "color": "red"}]
  """
  keys = {"object": "class", "color": "color", "place": "place"}
  return [{keys[field]: getattr(placed, field) for field in fields} for placed in objects]


def clauses_of(objects: Iterable[Placed], fields: Sequence[str] = ALL_FIELDS) -> list[dict]:
  """Lists a clause for each object, with the chosen fields and a count of 1."""
  return [{**fact, "count": 1} for fact in facts_of(objects, fields)]


def recolor(scene: Scene, config: ScenesConfig, rng: random.Random) -> SceneEdit | None:
  """Changes the color of all objects of one name: "Make the bell blue"."""
  name = rng.choice(sorted(counts_of(scene)))
  before = [placed for placed in scene.objects if placed.object == name]
  others = [placed for placed in scene.objects if placed.object != name]
  colors = [c for c in config.colors if all(c != placed.color for placed in before)]
  if not colors:
    return None
  color = rng.choice(colors)
  after = [dataclasses.replace(placed, color=color) for placed in before]
  target = Scene.of([*others, *after])
  return SceneEdit(
    rng.choice(_RECOLOR).format(x=named(name, len(before)), color=color),
    target,
    include=clauses_of(target.objects),
    changed=clauses_of(after, ("object", "color")),
    touched=[name],
    kept=[*facts_of(others), *facts_of(after, ("object", "place"))],
  )


def remove(scene: Scene, config: ScenesConfig, rng: random.Random) -> SceneEdit | None:
  """Removes all objects of one name, if other objects remain: "Remove the key"."""
  del config
  counts = counts_of(scene)
  if len(counts) == 1:
    return None
  name = rng.choice(sorted(counts))
  target = Scene.of([placed for placed in scene.objects if placed.object != name])
  return SceneEdit(
    rng.choice(_REMOVE).format(x=named(name, counts[name])),
    target,
    include=clauses_of(target.objects),
    changed=[],
    touched=[name],
    kept=facts_of(target.objects),
  )


def mirror(scene: Scene, config: ScenesConfig, rng: random.Random) -> SceneEdit | None:
  """Swaps the left and right half, or the top and bottom half.

  Objects change their places, but the drawings of the objects are not mirrored, because the world
  has no mirrored drawings.
  """
  del config
  axis = rng.choice(sorted(_MIRROR))
  after = []
  for placed in scene.objects:
    row, column = divmod(PLACES.index(placed.place), 2)
    place = PLACES[2 * row + 1 - column] if axis == "across" else PLACES[2 * (1 - row) + column]
    after.append(dataclasses.replace(placed, place=place))
  target = Scene.of(after)
  if target == scene:
    return None
  return SceneEdit(
    rng.choice(_MIRROR[axis]),
    target,
    include=clauses_of(target.objects),
    changed=clauses_of(target.objects, ("object", "place")),
    touched=sorted(counts_of(target)),
    kept=facts_of(target.objects, ("object", "color")),
  )


def add(scene: Scene, config: ScenesConfig, rng: random.Random) -> SceneEdit | None:
  """Adds an object whose name the scene lacks.

  It is added at a free place, or next to an object whose name is unique in the scene.
  """
  names = [name for name in config.objects if name not in counts_of(scene)]
  free = [place for place in PLACES if all(place != placed.place for placed in scene.objects)]
  if not names or not free:
    return None
  name, color = rng.choice(names), rng.choice(config.colors)
  if rng.random() < 0.5:
    return _add_at(scene, Placed(name, color, rng.choice(free)), rng)
  return _add_beside(scene, name, color, free, rng)


def _add_at(scene: Scene, added: Placed, rng: random.Random) -> SceneEdit:
  """Adds an object at a place: "Add a red star at the top left"."""
  where = rng.choice(_WHERE).format(place=added.place)
  return SceneEdit(
    rng.choice(_ADD).format(an_x=with_article(added.object, added.color), where=where),
    Scene.of([*scene.objects, added]),
    include=clauses_of([*scene.objects, added]),
    changed=clauses_of([added]),
    touched=[added.object],
    kept=facts_of(scene.objects),
  )


def _add_beside(
  scene: Scene, name: str, color: str, free: list[str], rng: random.Random
) -> SceneEdit | None:
  """Adds an object on one side of another object: "Add a red star above the bell".

  If the place in the column of the bell is free, the star is put there. The judge accepts every
  place above the bell.
  """
  counts = counts_of(scene)
  sides = []
  for index, placed in enumerate(scene.objects):
    for relation in RELATIONS:
      there = [place for place in free if relation in relations(place, placed.place)]
      if there and counts[placed.object] == 1:
        sides.append((index, relation, there))
  if not sides:
    return None
  index, relation, there = rng.choice(sides)
  other = scene.objects[index]
  place = min(there, key=lambda place: len(relations(place, other.place)))
  clause = {"class": name, "color": color, "count": 1}
  where = f"{rng.choice(RELATIONS[relation])} the {other.object}"
  return SceneEdit(
    rng.choice(_ADD).format(an_x=with_article(name, color), where=where),
    Scene.of([*scene.objects, Placed(name, color, place)]),
    include=[*clauses_of(scene.objects), {**clause, "position": [relation, index]}],
    changed=[*clauses_of([other], ("object",)), {**clause, "position": [relation, 0]}],
    touched=[other.object, name],
    kept=facts_of(scene.objects),
  )
