"""Measures the error rates of the judge on real images, with correct and with wrong captions."""

# B images, H height, W width.

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from examples.scenes import world
from examples.scenes.captions import OPPOSITES
from examples.scenes.judge import judge
from examples.scenes.judge.facts import check
from examples.scenes.options import COLORS, COMMON, Style


def measure(
  images: np.ndarray, facts: Sequence[dict], seed: int = 0, style: Style = "filled"
) -> dict:
  """Judges images with their own captions and with captions in which one fact is changed.

  `facts` are the facts of B documents. `images` are their true images, [B, H, W, 3] uint8. `seed`
  selects the changes.

  Returns {"images": B, "real": share, "changed": {kind of fact: {"captions": number of captions,
  "right": share}}, "changed_right": share over all kinds}. Shares count the images that are judged
  fully correct. A judge without errors has a share of 1 for "real" and 0 for changed captions.
  """
  rng = np.random.default_rng(seed)
  result = judge.find_objects(images, style)
  changed: dict[str, list[bool]] = {}
  for objects, fact in zip(result, facts):
    for kind, other in changed_facts(fact, rng).items():
      changed.setdefault(kind, []).append(check(objects, other["include"]).correct)
  real = [check(objects, fact["include"]).correct for objects, fact in zip(result, facts)]
  return {
    "images": len(real),
    "real": float(np.mean(real)),
    "changed": {
      kind: {"captions": len(right), "right": float(np.mean(right))}
      for kind, right in changed.items()
    },
    "changed_right": float(np.mean([r for right in changed.values() for r in right])),
  }


def describe(errors: dict) -> str:
  """Formats the result of `measure` as a sentence."""
  kinds = ", ".join(
    f"{kind} {entry['right']:.1%} of {entry['captions']}"
    for kind, entry in errors["changed"].items()
  )
  return (
    f"{errors['real']:.1%} of {errors['images']} images judged wholly correct; with one fact "
    f"changed {errors['changed_right']:.1%} ({kinds})"
  )


def changed_facts(facts: dict, rng: np.random.Generator) -> dict[str, dict]:
  """Changes one fact of a caption, separately for each kind of fact that the caption names.

  Returns kind of fact -> facts, of which one entry of `include` no longer fits the image.
  """
  names, colors = list(COMMON), list(COLORS)
  clauses = facts["include"]

  def changed(field: str, change: Callable[[Any], Any]) -> dict:
    places = [i for i, clause in enumerate(clauses) if field in clause]
    place = places[rng.integers(len(places))]
    new = {**clauses[place], field: change(clauses[place][field])}
    return {**facts, "include": [*clauses[:place], new, *clauses[place + 1 :]]}

  def another(values: Sequence[Any], taken: Collection[Any]) -> Any:
    return values[rng.choice([i for i, value in enumerate(values) if value not in taken])]

  shown = {clause["class"] for clause in clauses}
  changes = {
    "object": ("class", lambda name: another(names, shown)),
    "color": ("color", lambda color: another(colors, {color})),
    "count": ("count", lambda count: count + (1 if count == 1 else int(rng.choice((-1, 1))))),
    "relation": ("position", lambda position: [OPPOSITES[position[0]], position[1]]),
    "place": ("place", lambda place: another(world.PLACES, {place})),
  }
  return {
    kind: changed(field, change)
    for kind, (field, change) in changes.items()
    if any(field in clause for clause in clauses)
  }
