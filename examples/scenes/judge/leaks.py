"""Looks for facts of held-out scenes that training scenes show.

  python -m examples.scenes.judge.leaks workdir/scenes

A comparison of pixels would not help, because scenes of both splits look similar.
"""

from collections.abc import Iterable
import dataclasses
import itertools
import sys

from etils import epath

from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import RawPair
from examples.scenes.world import KINDS

SHOWN = 20  # Number of leaked scenes that the report names.


@dataclasses.dataclass(frozen=True)
class FactLeakReport:
  """Result of comparing the facts of held-out images with the facts of training images.

  Attributes:
    leaked: number of leaked held-out images by the reason why the images are held out.
    first: a sentence about each of the first leaked images.
  """

  heldout: int
  train: int
  leaked: dict[str, int]
  first: list[str]


def leaks(folder: epath.PathLike) -> FactLeakReport:
  """Compares the facts of held-out pairs in a raw folder with the facts of its training pairs.

  A held-out scene has leaked in each of these cases:

  - Training or the bank shows a scene with equal facts.
  - The scene is held out for its objects with their colors, or for its pairs of objects, and
    training and the bank together show all these objects or pairs.
  - The scene is held out for a rare object, and training shows the object, or the bank shows the
    object in the color of the scene. The bank may show the object in other colors.
  """
  heldout = list(_pairs(folder, "heldout"))
  seen: dict[str, set[str]] = {kind: set() for kind in KINDS}
  train = 0
  for pair in _pairs(folder, "train"):
    train += 1
    for kind in KINDS:
      seen[kind] |= _shown(pair.facts, kind)
  leaked, first = dict.fromkeys(KINDS, 0), []
  in_bank = set()
  for pair in _pairs(folder, "bank"):
    in_bank |= _shown(pair.facts, "pair")
    for kind in set(KINDS) - {"rare"}:
      seen[kind] |= _shown(pair.facts, kind)
  for pair in heldout:
    kind = pair.facts["heldout"]
    if kind == "rare" and _shown(pair.facts, "pair") & in_bank:
      leaked[kind] += 1
      first.append(f"heldout '{pair.key}' (rare, in the bank): {pair.concept}")
    elif _shown(pair.facts, "scene") <= seen["scene"] or _shown(pair.facts, kind) <= seen[kind]:
      leaked[kind] += 1
      first.append(f"heldout '{pair.key}' ({kind}): {pair.concept}")
  return FactLeakReport(len(heldout), train, leaked, first[:SHOWN])


def _pairs(folder: epath.PathLike, split: str) -> Iterable[RawPair]:
  for name in reader.shards(folder):
    yield from reader.read_shard(folder, name, RawPair, split)


def _shown(facts: dict, kind: str) -> set:
  """Returns the facts that training must not show if a scene is held out for the reason `kind`."""
  objects = facts["objects"]
  match kind:
    case "scene":
      return {tuple(sorted((o["class"], o["color"], o["place"]) for o in objects))}
    case "pair":
      return {(o["class"], o["color"]) for o in objects}
    case "objects":
      return set(itertools.combinations(sorted(o["class"] for o in objects), 2))
    case _:
      return {o["class"] for o in objects}


if __name__ == "__main__":
  report = leaks(epath.Path(sys.argv[1]) / "raw")
  print(report)
  sys.exit(1 if report.first else 0)
