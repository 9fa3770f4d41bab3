"""Makes instruction data about scenes. The correct answers are known exactly.

A record depends only on the config, its task, its split and its index, so any number of records can
be made in any order. In held-out records, the scene before an edit is a held-out scene. Training
records show training scenes before and after an edit, so an edit with a held-out result is dropped.
"""

from collections.abc import Callable, Sequence
import random
from typing import TypeVar

import numpy as np

from cm3leon_jax.data.instructions.edges import canny_edges
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.errors import UserError
from examples.scenes import edits, questions, source, world
from examples.scenes.captions import Description
from examples.scenes.drawings import CELL, SIDE, box, render
from examples.scenes.edits import SceneEdit, clauses_of, facts_of
from examples.scenes.options import COMMON, ScenesConfig
from examples.scenes.questions import SceneQuestion
from examples.scenes.world import KINDS, PLACES, Placed, Scene

# H height, W width of an image.

Split = str  # "train" or "heldout".
T = TypeVar("T")

# These tasks use the record of the source `scenes` that has the same split and index.
CAPTIONED = ("draw", "describe", "complete", "located", "edges")
QUESTIONS = ("count", "color", "exists", "relation")
EDITS: dict[str, Callable[[Scene, ScenesConfig, random.Random], SceneEdit | None]] = {
  "recolor": edits.recolor,
  "remove": edits.remove,
  "mirror": edits.mirror,
  "add": edits.add,
}
TASKS = (*CAPTIONED, *QUESTIONS, *EDITS)
TEXT_TASKS = ("describe", *QUESTIONS)  # Tasks whose answers are texts, not images.

HIDDEN = 128  # Pixel value of a hidden half. No object has this color.
HALVES = {
  "left": (0, 0, CELL, SIDE),
  "right": (CELL, 0, SIDE, SIDE),
  "top": (0, 0, SIDE, CELL),
  "bottom": (0, CELL, SIDE, SIDE),
}  # Boxes, as in `infill_image`: left, top, right, bottom in pixels.
RARE_SHARE = 0.15  # Share of questions whose scene has a rare object as its only object.
# Share of training edits whose scenes have rare objects. There are too many rare objects to
# memorize, so a model must copy them from the input image to keep or move them.
RARE_EDITS = 0.5
TRIES = 10_000  # Number of scenes that are drawn for a record before an error is raised.


def record(config: ScenesConfig, task: str, split: Split, index: int) -> Record:
  """Returns record `index` of a task.

  A record has these texts and images:

    tasks                             texts              images
    draw, describe                    caption            image
    complete                          caption            given: one half is HIDDEN; image
    located                           caption, located   image
    edges                             caption            edges, image
    count, color, exists, relation    question, answer   image
    recolor, remove, mirror, add      instruction        before, after

  The facts describe the last image in the table. They have the fields of the facts of a document
  (docs/evaluation.md), and `task`. Edits add `changed`, `touched` and `kept`, see `edits`.
  `complete` adds `kept`, and `box`: the box of the hidden half, in the form that `infill_image`
  takes.

  Args:
    config: questions and edits draw their own scenes, not those of the source `scenes`. For their
      scenes, only `objects`, `colors`, `style`, `seed` and, if `categories` has `rare`,
      `rare_objects` are read.
    task: one of TASKS.
    split: "train" or "heldout".

  Returns:
    A record. Its group is the scene of the input image, or of the output image if there is no input
    image.

  Raises:
    UserError: the task is unknown, or the split has no scene for the task.
  """
  if task not in TASKS:
    raise UserError(f"the task '{task}' is unknown; it must be one of {', '.join(TASKS)}.")
  rng = random.Random(f"{config.seed}/{task}/{split}/{index}")
  if task in CAPTIONED:
    return _captioned(config, task, split, index, rng)
  if task in EDITS:
    return _edit(config, task, split, index, rng)
  return _question(config, task, split, index, rng)


def may_be_trained(scene: Scene) -> bool:
  """Returns whether training may show a scene. A rare object must be alone in its scene."""
  return (len(scene.objects) == 1 or not _rare(scene)) and (world.split_of_scene(scene) == "train")


def may_be_edited(scene: Scene) -> bool:
  """Returns whether a training edit may show a scene.

  A scene without rare objects must satisfy `may_be_trained`. In a scene with rare objects, these
  may have any color and place and may be next to other objects. But the scene must not show a
  held-out rare object, a common object in its held-out color, or a held-out pair of common objects.
  """
  rare = _rare(scene)
  if not rare or any(map(world.is_heldout_rare, rare)):
    return may_be_trained(scene)
  common = Scene(tuple(placed for placed in scene.objects if placed.object not in rare))
  # "bank" and "scene" hold out only complete scenes, but `common` is a part of a scene.
  return world.split_of_scene(common) in ("train", "bank", "scene")


def _rare(scene: Scene) -> set[str]:
  return {placed.object for placed in scene.objects if placed.object not in COMMON}


def located(caption: str, objects: Sequence[Placed]) -> str:
  """Appends the boxes of objects in pixels to a caption, in CM3Leon's format.

  located("a bell", <bell at the top left>) = "a bell with bell at location (3, 2) -> (21, 23)"
  """
  places = []
  for placed in objects:
    x0, y0, x1, y1 = box(placed)
    places.append(f"{placed.object} at location ({x0}, {y0}) -> ({x1}, {y1})")
  return f"{caption} with {', '.join(places)}"


def _captioned(
  config: ScenesConfig, task: str, split: Split, index: int, rng: random.Random
) -> Record:
  """Makes a record from a captioned scene of the source `scenes`."""
  pair = source.pair(config, split, index)
  scene = Scene.parse(str(pair.image))
  image = render(scene, config.style)
  texts, images, facts = {"caption": pair.caption}, {"image": image}, dict(pair.facts)
  if task in ("located", "edges"):
    facts["include"] = _with_places(scene, pair.facts["include"])
  if task == "located":
    texts["located"] = located(pair.caption, scene.objects)
  elif task == "edges":
    images = {"edges": canny_edges(image), **images}
  elif task == "complete":
    half = rng.choice([half for half in HALVES if _inside(scene, half)])
    facts["box"] = list(HALVES[half])
    facts["kept"] = facts_of(x for x in scene.objects if x not in _inside(scene, half))
    images = {"given": hide(image, HALVES[half]), **images}
  return _record(task, split, index, scene, texts, images, facts)


def _with_places(scene: Scene, include: list[dict]) -> list[dict]:
  """Lists a clause per object with its place and, if the caption names its color, the color."""
  named = {clause["class"] for clause in include if "color" in clause}
  colored = [placed for placed in scene.objects if placed.object in named]
  plain = [placed for placed in scene.objects if placed.object not in named]
  return [*clauses_of(colored), *clauses_of(plain, ("object", "place"))]


def _inside(scene: Scene, half: str) -> list[Placed]:
  return [placed for placed in scene.objects if half in placed.place.split()]


def hide(image: np.ndarray, hidden: Sequence[int]) -> np.ndarray:
  """Returns a copy of an image, [H, W, 3] uint8, in which a box has the value HIDDEN.

  `hidden` is the box: left, top, right, bottom in pixels. Right and bottom are exclusive.
  """
  left, top, right, bottom = hidden
  given = image.copy()
  given[top:bottom, left:right] = HIDDEN
  return given


def _question(
  config: ScenesConfig, task: str, split: Split, index: int, rng: random.Random
) -> Record:
  """Makes a record of a question. The counts 1 to 4 are equally frequent, and so are yes and no."""
  number = _in_turn((1, 2, 3, 4), config, task, split, index)
  shown = _in_turn((True, False), config, task, split, index)
  for _ in range(TRIES):
    scene = _draw(config, task, split, rng, number if task == "count" else 1)
    question = _ask(config, task, split, rng, scene, number, shown)
    if question is not None:
      texts = {"question": question.question, "answer": question.answer}
      images = {"image": render(scene, config.style)}
      facts = _all_facts(task, scene, scene, clauses_of(scene.objects))
      return _record(task, split, index, scene, texts, images, facts)
  raise _no_scene(task, split)


def _ask(
  config: ScenesConfig,
  task: str,
  split: Split,
  rng: random.Random,
  scene: Scene,
  number: int,
  shown: bool,
) -> SceneQuestion | None:
  if task == "count":
    return questions.ask_count(scene, number, rng)
  if task == "color":
    return questions.ask_color(scene, rng)
  if task == "relation":
    return questions.ask_relation(scene, rng)
  # An absent object comes from another scene, so that its name does not reveal the answer.
  other = scene if shown else _draw(config, task, split, rng, 1)
  name = rng.choice(sorted(questions.counts_of(other)))
  if shown or questions.may_be_absent(scene, name):
    return questions.ask_exists(scene, name, rng)
  return None


def _edit(config: ScenesConfig, task: str, split: Split, index: int, rng: random.Random) -> Record:
  """Makes a record of an edit. In training, `may_be_edited` must accept both of its scenes."""
  has_rare = split == "train" and "rare" in config.categories
  with_rare = has_rare and rng.random() < RARE_EDITS
  for _ in range(TRIES):
    scene = _draw(config, task, split, rng, rng.choices((1, 2, 3), (6, 2, 1))[0])
    if with_rare:
      scene = _with_rare(config, scene, rng, all_of_them=task == "mirror")
    edit = EDITS[task](scene, config, rng)
    if edit is None or (
      split == "train" and not (may_be_edited(scene) and may_be_edited(edit.target))
    ):
      continue
    facts = {
      **_all_facts(task, scene, edit.target, edit.include),
      "changed": edit.changed,
      "touched": edit.touched,
      "kept": edit.kept,
    }
    images = {"before": render(scene, config.style), "after": render(edit.target, config.style)}
    texts = {"instruction": edit.instruction}
    return _record(task, split, index, scene, texts, images, facts)
  raise _no_scene(task, split)


def _all_facts(task: str, scene: Scene, shown: Scene, include: list[dict]) -> dict:
  """Returns the facts of `shown`. Their field `heldout` says why `scene` is held out."""
  split = world.split_of_scene(scene)
  kind = split if split in KINDS else ""
  return source.facts_of(task, kind, shown, Description("", include, []))


def _record(
  task: str, split: Split, index: int, scene: Scene, texts: dict, images: dict, facts: dict
) -> Record:
  key = f"{source.NAME}/{task}/{split}/{index:07d}"
  return Record(key, scene.facts_key, texts, images, {"task": task, **facts})


def _in_turn(options: Sequence[T], config: ScenesConfig, task: str, split: Split, index: int) -> T:
  """Chooses one of n options. Each block of n indices gets each option once, in random order."""
  block, i = divmod(index, len(options))
  rng = random.Random(f"{config.seed}/{task}/{split}/turns/{block}")
  return rng.sample(options, len(options))[i]


def _draw(config: ScenesConfig, task: str, split: Split, rng: random.Random, equal: int) -> Scene:
  """Draws a scene of a split: a rare object, or `equal` copies of one object with other objects."""
  rare = world.rare_objects(config) if "rare" in config.categories else ()
  for _ in range(TRIES):
    if rare and task in ("color", "exists") and rng.random() < RARE_SHARE:
      name = rng.choice(rare)
      scene = Scene((Placed(name, world.rare_color(name), rng.choice(PLACES)),))
    else:
      scene = _mixed(config, rng, equal)
    if split == "train" and may_be_trained(scene):
      return scene
    if split == "heldout" and world.split_of_scene(scene) in KINDS:
      return scene
  raise _no_scene(task, split)


def _mixed(config: ScenesConfig, rng: random.Random, equal: int) -> Scene:
  """Draws a scene with `equal` copies of one object, and other objects, which may also repeat."""
  others = rng.randint(0, len(PLACES) - equal)
  names = rng.sample(config.objects, min(1 + others, len(config.objects)))
  colors = dict(zip(names, rng.choices(config.colors, k=len(names))))
  few = names[1 : 1 + rng.randint(1, 3)]
  shown = [names[0]] * equal + (rng.choices(few, k=others) if few else [])
  places = rng.sample(PLACES, len(shown))
  return Scene.of([Placed(name, colors[name], place) for name, place in zip(shown, places)])


def _with_rare(config: ScenesConfig, scene: Scene, rng: random.Random, all_of_them: bool) -> Scene:
  """Replaces the objects of one name, or of all names, by rare objects in any color.

  If only one name is replaced, a model that does not know the rare name can infer which object has
  this name, because the model knows the names of all other objects.
  """
  names = sorted(questions.counts_of(scene))
  chosen = names if all_of_them else [rng.choice(names)]
  known = [x for x in world.rare_objects(config) if not world.is_heldout_rare(x)]
  drawn = rng.sample(known, len(chosen))
  as_drawn = {name: (rare, rng.choice(config.colors)) for name, rare in zip(chosen, drawn)}
  return Scene.of(
    [
      Placed(*as_drawn.get(placed.object, (placed.object, placed.color)), placed.place)
      for placed in scene.objects
    ]
  )


def _no_scene(task: str, split: str) -> UserError:
  return UserError(
    f"raw.options have no scene of the split '{split}' for the task '{task}'; name more objects "
    "or colors."
  )
