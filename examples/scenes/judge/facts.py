"""Checks the facts of a caption against the objects that an image of a scene shows."""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import itertools

from examples.scenes.captions import relations

UNKNOWN = "unknown"  # Name of an object without a clear shape, or of a color outside the palette.
FACTS = ("object", "color", "count", "place")


@dataclasses.dataclass(frozen=True)
class Found:
  """Object that an image shows.

  Attributes:
    name, color: as in captions, or `UNKNOWN`.
    place: one of `world.PLACES`.
    score: correlation with the best-matching silhouette, at most 1.
    box: left, top, right, bottom of the ink in pixels. Right and bottom are exclusive.
  """

  name: str
  color: str
  place: str
  score: float
  box: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class SceneVerdict:
  """Result of checking an image against the facts of its caption.

  Attributes:
    correct: whether the image shows exactly what the caption says and nothing else.
    reason: one line per error, or "" if there is no error.
    found: objects that the image shows, in the order of the places.
    holds: kind of fact -> whether all facts of this kind hold. A kind that the caption does not
      name is absent. `object` holds if the image and the caption have the same names. `count` holds
      if the total number of objects is correct. For `color` and `place`, which includes relations,
      see `check`.
  """

  correct: bool
  reason: str
  found: tuple[Found, ...]
  holds: dict[str, bool]


def check(found: Sequence[Found], clauses: Sequence[dict]) -> SceneVerdict:
  """Compares found objects with the clauses of a caption, in GenEval's layout.

  Each object of the caption is compared with a found object of the same name. If there are several,
  the assignment with the fewest errors in color, place and relations is used. If the number of
  found objects is correct, a missing object is compared with a found object of another name, so
  that color and place are still judged. A clause has "class" and "count". It also has "color",
  "place" and "position" if the caption states them. "position" is [relation, index of the other
  clause].
  """
  expected = [clause for clause in range(len(clauses)) for _ in range(clauses[clause]["count"])]
  filled = [*found, *[None] * (len(expected) - len(found))]
  wrong = min(
    (
      _wrong_facts(clauses, expected, chosen, any_name=len(found) == len(expected))
      for chosen in itertools.permutations(filled, len(expected))
    ),
    key=lambda wrong: [len(wrong["name"]), len(wrong["color"]) + len(wrong["place"])],
  )
  asked = Counter({clause["class"]: 0 for clause in clauses})
  for index in expected:
    asked[clauses[index]["class"]] += 1
  seen = Counter(thing.name for thing in found)
  reasons = [
    f"expected {asked[name]} {name}, found {seen[name]}"
    for name in sorted({*asked, *seen})
    if asked[name] != seen[name]
  ]
  reasons += [*wrong["color"], *wrong["place"]]
  holds = {"object": set(asked) == set(seen), "count": len(found) == len(expected)}
  if any("color" in clause for clause in clauses):
    holds["color"] = not wrong["color"]
  if any("place" in clause or "position" in clause for clause in clauses):
    holds["place"] = not wrong["place"]
  return SceneVerdict(not reasons, "\n".join(reasons), tuple(found), holds)


def _wrong_facts(
  clauses: Sequence[dict], expected: list[int], chosen: Sequence[Found | None], any_name: bool
) -> dict[str, list]:
  """Lists the errors of one assignment of the found objects `chosen` to clauses.

  `expected` has, for each chosen object, the index of its clause. If `any_name` is False, an object
  whose name differs from the name in its clause counts as missing.
  """
  wrong: dict[str, list] = {"name": [], "color": [], "place": []}
  groups: list[list[Found | None]] = [[] for _ in clauses]
  for index, thing in zip(expected, chosen):
    clause, name = clauses[index], clauses[index]["class"]
    if thing is None or thing.name != name:
      wrong["name"].append(name)
      thing = thing if any_name else None
    groups[index].append(thing)
    for field in ("color", "place"):
      value = getattr(thing, field) if thing else "none"
      if field in clause and clause[field] != value:
        wrong[field].append(f"expected {name} {clause[field]}, found {value}")
  for clause, things in zip(clauses, groups):
    if "position" in clause:
      relation, target = clause["position"]
      pairs = itertools.product(things, groups[target])
      if not all(a and b and relation in relations(a.place, b.place) for a, b in pairs):
        wrong["place"].append(f"expected {clause['class']} {relation} {clauses[target]['class']}")
  return wrong
