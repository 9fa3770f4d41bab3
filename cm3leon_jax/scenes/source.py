"""Makes the records of the source `scenes`: captioned images of the world in `world.py`.

A record depends only on the config, its split and its index, so any number of records can be made
in any order.
"""

from collections.abc import Iterable
import dataclasses
import functools
import itertools
import random

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.drawn import FactLeakReport, check_license, load_drawings
from cm3leon_jax.data.sources.formats import SourcePart
from cm3leon_jax.data.sources.records import SPLITS, RawPair
from cm3leon_jax.scenes import world
from cm3leon_jax.scenes.captions import Description, describe, describe_plainly, relations
from cm3leon_jax.scenes.config import CATEGORIES, COMMON, TWO_OBJECTS, ScenesConfig
from cm3leon_jax.scenes.drawings import SIDE, box, render
from cm3leon_jax.scenes.questions import counts_of
from cm3leon_jax.scenes.world import KINDS, Scene

NAME = "scenes"  # Value of `raw.source`, and prefix of the keys of records.
SOURCE = "https://pictogrammers.com/library/mdi"
LICENSE = "Apache-2.0"
ATTRIBUTION = "Pictogrammers, Material Design Icons 7"
SHOWN = 20  # Number of leaked scenes that the report names.
PART_RECORDS = 2_000  # Number of records per part. Each part becomes a raw shard.


def pair(config: ScenesConfig, split: str, index: int) -> RawPair:
  """Returns record `index` of a split. `ScenesSource.load` renders the image of a record."""
  rng = random.Random(f"{config.seed}/{split}/{index}")
  if split == "train":
    category, scene = _train_scene(config, rng)
    kind = ""
  elif split == "bank":
    kind, scene = "", world.bank_scenes(config)[index]
    category = "colors" if scene.objects[0].object in COMMON else "rare"
  else:
    category, kind, scene = _heldout_scene(config, index)
  # In the bank, all captions have the same wording, so captions of one object differ only in color
  # and place.
  description = describe_plainly(scene) if split == "bank" else describe(category, scene, rng)
  key = scene.facts_key
  return RawPair(
    key=f"{NAME}/{split}/{index:07d}",
    image=key,
    caption=description.caption,
    source=SOURCE,
    license=LICENSE,
    attribution=ATTRIBUTION,
    group=scene.drawings_key,
    split=split,
    concept=key,
    facts=facts_of(category, kind, scene, description),
  )


def _train_scene(config: ScenesConfig, rng: random.Random) -> tuple[str, Scene]:
  """Draws a category with the probability of its share, and then one of its training scenes."""
  category = rng.choices(config.categories, config.shares or None)[0]
  total = world.number_of_scenes_of(config, category)
  while True:  # `ScenesSource.parts` checks that each category has a training scene.
    scene = world.scene_at(config, category, rng.randrange(total))
    if world.split_of_scene(scene, config.rare_places) == "train":
      return category, scene


def _heldout_scene(config: ScenesConfig, index: int) -> tuple[str, str, Scene]:
  """Chooses category, reason and scene of a held-out record. The indices cycle through all."""
  rounds, i = divmod(index, len(config.categories))
  category = config.categories[i]
  wanted = -(-config.heldout // len(config.categories))
  scenes = _scenes_by_kind(config, category, wanted)
  number, i = divmod(rounds, len(scenes))
  kind = list(scenes)[i]
  return category, kind, scenes[kind][number % len(scenes[kind])]


def _kinds(category: str) -> tuple[str, ...]:
  """Returns the reasons, out of `KINDS`, for which scenes of a category can be held out."""
  if category == "rare":
    return ("rare",)
  return KINDS[:3] if category in TWO_OBJECTS else KINDS[:2]


@functools.cache
def _scenes_by_kind(config: ScenesConfig, category: str, most: int) -> dict[str, list[Scene]]:
  """Lists up to `most` distinct held-out scenes of a category per reason, in random order."""
  number = CATEGORIES.index(category)
  total = world.number_of_scenes_of(config, category)
  found: dict[str, list[Scene]] = {kind: [] for kind in (*_kinds(category), "train")}
  for i in np.random.default_rng((config.seed, number)).permutation(total):
    scene = world.scene_at(config, category, int(i))
    scenes = found.get(world.split_of_scene(scene, config.rare_places))
    if scenes is not None and len(scenes) < most:
      scenes.append(scene)
      if all(len(scenes) == most for scenes in found.values()):
        break
  train = found.pop("train")
  heldout = {kind: scenes for kind, scenes in found.items() if scenes}
  for some, what in ((heldout, "hold out"), (train, "train on")):
    if not some:
      raise UserError(
        f"config.scenes has no scene to {what} in category '{category}'; name more objects or "
        "colors, or leave the category out."
      )
  return heldout


def facts_of(category: str, kind: str, scene: Scene, description: Description) -> dict:
  """Returns the field `facts` of a record; see docs/evaluation.md."""
  return {
    "tag": category,
    "heldout": kind,
    "include": description.include,
    "exclude": description.exclude,
    "objects": [
      {"class": placed.object, "color": placed.color, "place": placed.place, "box": box(placed)}
      for placed in scene.objects
    ],
    "counts": counts_of(scene),
    "relations": [
      [a.object, relation, b.object]
      for a, b in itertools.permutations(scene.objects, 2)
      if a.object != b.object
      for relation in relations(a.place, b.place)
    ],
  }


def check_installed() -> None:
  """Raises UserError if the icon font, which `drawings` imports on first use, is not installed."""
  load_drawings(NAME, "fonticon_mdi7")


@dataclasses.dataclass(frozen=True)
class ScenesSource:
  """Implements `data.sources.drawn.DrawnSource` for the source `scenes`."""

  config: ScenesConfig

  name = NAME

  def identity(self) -> dict:
    """Returns the section `scenes`."""
    return dataclasses.asdict(self.config)

  def parts(self, licenses: tuple[str, ...], resolution: int) -> list[SourcePart]:
    """Splits the source into parts, each of which is a range of indices in one split.

    Raises:
      UserError: `resolution` is not `SIDE`; a category has no training scene or no held-out scene;
        `bank` exceeds the number of scenes that only the bank may show; the icons are not
        installed; or the license is not allowed.
    """
    check_installed()
    check_license(licenses, LICENSE, NAME)
    config = self.config
    if resolution != SIDE:
      raise UserError(
        f"config.raw.resolution is {resolution}; the images of scenes have {SIDE} pixels: set it "
        f"to {SIDE}."
      )
    for category in config.categories:
      _scenes_by_kind(config, category, 1)
    if config.bank > (most := len(world.bank_scenes(config))):
      raise UserError(
        f"config.scenes.bank is {config.bank}; {len(config.objects)} common and "
        f"{config.rare_objects} rare objects in {len(config.colors)} colors give at most {most}."
      )
    return [
      SourcePart(NAME, (split, str(start), str(min(start + PART_RECORDS, total))), 0)
      for split, total in zip(SPLITS, (config.train, config.heldout, config.bank))
      for start in range(0, total, PART_RECORDS)
    ]

  def read(self, part: SourcePart) -> list[RawPair]:
    """Returns the records of a part."""
    split, start, end = part.files
    return [pair(self.config, split, index) for index in range(int(start), int(end))]

  def load(self, image: str, resolution: int) -> np.ndarray:
    """Renders the image of a record, [H, W, 3] uint8. `image` is the record's field `image`."""
    del resolution  # `parts` checks it.
    return render(Scene.parse(image), self.config.style)

  def number_of(self, pair: RawPair) -> str:
    """Returns the name of the counter that a record increments, e.g. "train_colors"."""
    return "_".join(filter(None, (pair.split, pair.facts["tag"], pair.facts["heldout"])))

  def numbers(self) -> dict[str, int]:
    """Returns the number of distinct scenes."""
    return {"distinct_scenes": world.number_of_scenes(self.config)}

  def leaks(self, folder: epath.PathLike) -> FactLeakReport:
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
