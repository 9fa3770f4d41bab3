"""Makes the records of the demo, captioned images of the world in `world.py`.

A config names them: `config.raw.source = "source.py:records"`.

A record depends only on the config, its split and its index, so any number of records can be made
in any order.
"""

from collections.abc import Iterator
import functools
import itertools
import random
from typing import Any

import numpy as np

from cm3leon_jax.config.build import build
from cm3leon_jax.data.sources.records import SPLITS, RawPair
from cm3leon_jax.errors import UserError
from examples.scenes import world
from examples.scenes.captions import Description, describe, describe_plainly, relations
from examples.scenes.drawings import alpha, box, render
from examples.scenes.options import CATEGORIES, COMMON, TWO_OBJECTS, ScenesConfig, Style
from examples.scenes.questions import counts_of
from examples.scenes.world import KINDS, Scene

NAME = "scenes"  # Prefix of the keys of records.
SOURCE = "https://pictogrammers.com/library/mdi"
LICENSE = "Apache-2.0"
ATTRIBUTION = "Pictogrammers, Material Design Icons 7"


def records(**options: Any) -> Iterator[dict]:
  """Yields the records of all splits, for `config.raw.source`. `options` are of `ScenesConfig`."""
  config = build(ScenesConfig, options, "raw.options")
  check(config)
  for split, total in zip(SPLITS, (config.train, config.heldout, config.bank)):
    for index in range(total):
      record = pair(config, split, index)
      draw = functools.partial(_draw, str(record.image), config.style)
      yield {**vars(record), "image": draw}


def _draw(facts_key: str, style: Style) -> np.ndarray:
  return render(Scene.parse(facts_key), style)


def check(config: ScenesConfig) -> None:
  """Checks that the scenes of a config can be drawn and split.

  Raises:
    UserError: a category has no training scene or no held-out scene; `bank` exceeds the number of
      scenes that only the bank may show; or the icons are not installed.
  """
  alpha("bell")  # Raises an error if the icons are not installed.
  for category in config.categories:
    _scenes_by_kind(config, category, 1)
  if config.bank > (most := len(world.bank_scenes(config))):
    raise UserError(
      f"config.raw.options.bank is {config.bank}; {len(config.objects)} common and "
      f"{config.rare_objects} rare objects in {len(config.colors)} colors give at most {most}."
    )


def pair(config: ScenesConfig, split: str, index: int) -> RawPair:
  """Returns record `index` of a split. Its field `image` has the facts of the image."""
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
  while True:  # `check` makes sure that each category has a training scene.
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
  result: dict[str, list[Scene]] = {kind: [] for kind in (*_kinds(category), "train")}
  for i in np.random.default_rng((config.seed, number)).permutation(total):
    scene = world.scene_at(config, category, int(i))
    scenes = result.get(world.split_of_scene(scene, config.rare_places))
    if scenes is not None and len(scenes) < most:
      scenes.append(scene)
      if all(len(scenes) == most for scenes in result.values()):
        break
  train = result.pop("train")
  heldout = {kind: scenes for kind, scenes in result.items() if scenes}
  for some, what in ((heldout, "hold out"), (train, "train on")):
    if not some:
      raise UserError(
        f"config.raw.options has no scene to {what} in category '{category}'; name more objects or "
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
