"""Checks the facts of a caption of `scenes` on the objects that an image shows."""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import itertools

from cm3leon_jax.scenes.captions import relations

UNKNOWN = "unknown"  # Object of no clear shape, or color that is no one of the palette.
FACTS = ("object", "color", "count", "place")


@dataclasses.dataclass(frozen=True)
class Found:
  """An object that an image shows.

  Attributes:
    name: spoken name of the object, or `UNKNOWN`.
    color: name of the color, or `UNKNOWN`.
    place: where it stands.
    score: correlation with the silhouette that matches best, at most 1.
    box: left, top, right, bottom of its ink in pixels; right and bottom are outside.
  """

  name: str
  color: str
  place: str
  score: float
  box: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class SceneVerdict:
  """What an image shows of the facts of its caption.

  Attributes:
    correct: whether the image shows exactly what the caption says, and nothing more.
    reason: what is wrong, a line each; "" if nothing is.
    found: objects that the image shows, place by place.
    holds: kind of fact -> whether all facts of the kind hold. `object`: the objects found are those
      named. `count`: as many objects as named, whatever they are. `color`, and `place`, which also
      counts relations: see `check`. A kind that the caption does not name is absent.
  """

  correct: bool
  reason: str
  found: tuple[Found, ...]
  holds: dict[str, bool]


def check(found: Sequence[Found], clauses: Sequence[dict]) -> SceneVerdict:
  """Compares found objects with the clauses of a caption, in GenEval's layout.

  A named object is compared with the found one of its name; of several, with the one that fits
  best by color, place and relations. If as many objects are found as named, one of another name or
  shape takes the place of one that is missing: then its color and place are still judged.

  Args:
    found: objects of the image.
    clauses: {"class", "count"} each, and "color", "place", "position" where the caption says them;
      "position" is [relation, number of the other clause].
  """
  slots = [clause for clause in range(len(clauses)) for _ in range(clauses[clause]["count"])]
  filled = [*found, *[None] * (len(slots) - len(found))]
  wrong = min(
    (
      _wrong_facts(clauses, slots, chosen, any_name=len(found) == len(slots))
      for chosen in itertools.permutations(filled, len(slots))
    ),
    key=lambda wrong: [len(wrong["name"]), len(wrong["color"]) + len(wrong["place"])],
  )
  asked = Counter({clause["class"]: 0 for clause in clauses})
  for slot in slots:
    asked[clauses[slot]["class"]] += 1
  seen = Counter(thing.name for thing in found)
  reasons = [
    f"expected {asked[name]} {name}, found {seen[name]}"
    for name in sorted({*asked, *seen})
    if asked[name] != seen[name]
  ]
  reasons += [*wrong["color"], *wrong["place"]]
  holds = {"object": set(asked) == set(seen), "count": len(found) == len(slots)}
  if any("color" in clause for clause in clauses):
    holds["color"] = not wrong["color"]
  if any("place" in clause or "position" in clause for clause in clauses):
    holds["place"] = not wrong["place"]
  return SceneVerdict(not reasons, "\n".join(reasons), tuple(found), holds)


def _wrong_facts(
  clauses: Sequence[dict], slots: list[int], chosen: Sequence[Found | None], any_name: bool
) -> dict[str, list]:
  """Lists what is wrong if `chosen`, [slots], are the objects that the clauses name.

  Without `any_name`, an object of another name than the clause counts as none.
  """
  wrong: dict[str, list] = {"name": [], "color": [], "place": []}
  groups: list[list[Found | None]] = [[] for _ in clauses]
  for slot, thing in zip(slots, chosen):
    clause, name = clauses[slot], clauses[slot]["class"]
    if thing is None or thing.name != name:
      wrong["name"].append(name)
      thing = thing if any_name else None
    groups[slot].append(thing)
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
