import itertools
import random

import numpy as np
import pytest

from examples.scenes import drawings, world
from examples.scenes.captions import describe, plural, with_article
from examples.scenes.options import CATEGORIES, COLORS, COMMON, RARE, ScenesConfig
from examples.scenes.world import (
  HELDOUT_COLOR,
  PLACES,
  Placed,
  Scene,
  number_of_scenes_of,
  scene_at,
)


def some_scenes(category, number):
  config, rng = ScenesConfig(), random.Random(0)
  total = number_of_scenes_of(config, category)
  return [scene_at(config, category, rng.randrange(total)) for _ in range(number)]


def test_a_scene_and_its_key():
  scene = Scene.of([Placed("key", "blue", "top right"), Placed("bell", "red", "top left")])
  assert [placed.object for placed in scene.objects] == ["bell", "key"]
  assert scene.facts_key == "blue key top right, red bell top left"
  assert Scene.parse(scene.facts_key) == scene
  rare = Scene((Placed("basketball hoop", "cyan", "bottom left"),))
  assert rare.facts_key == "cyan basketball hoop bottom left"
  for category in CATEGORIES:
    for scene in some_scenes(category, 50):
      assert Scene.parse(scene.facts_key) == scene


def test_a_scene_is_held_out_for_the_first_reason():
  def split(*objects):
    return world.split_of_scene(Scene.of(Placed(*o) for o in objects))

  bell = ("bell", HELDOUT_COLOR["bell"], "top left")
  never = next(name for name in RARE if world.is_heldout_rare(name))
  seen = next(name for name in RARE if not world.is_heldout_rare(name))
  together = next(
    pair for pair in itertools.combinations(COMMON, 2) if world.is_heldout_objects(*pair)
  )
  black = [(name, "black" if HELDOUT_COLOR[name] != "black" else "red") for name in together]
  for name, in_own_color in ((never, ["rare"] * 4), (seen, ["bank", "bank", "bank", "train"])):
    own = world.rare_color(name)
    splits = {color: sorted(split((name, color, p)) for p in PLACES) for color in COLORS}
    assert splits.pop(own) == in_own_color
    assert set(map(tuple, splits.values())) == {("bank",) * 4}
  assert split(bell) == split(bell, (*black[0], "top right")) == "pair"
  assert split((*black[0], "top left"), (*black[1], "top right")) == "objects"
  name = black[0][0]
  for color in set(COLORS) - {HELDOUT_COLOR[name]}:
    alone = {split((name, color, place)) for place in PLACES}
    assert alone <= ({"bank"} if color == world.bank_color(name) else {"train", "scene"})


def test_training_may_show_rare_objects_at_more_places():
  never = next(name for name in RARE if world.is_heldout_rare(name))
  seen = next(name for name in RARE if not world.is_heldout_rare(name))
  for count in (1, 2, 4):
    splits = {
      name: [
        world.split_of_scene(Scene((Placed(name, world.rare_color(name), place),)), count)
        for place in PLACES
      ]
      for name in (never, seen)
    }
    assert splits[never] == ["rare"] * 4
    assert splits[seen].count("train") == count
    assert splits[seen][PLACES.index(world.rare_place(seen))] == "train"


def test_shares_of_the_splits():
  """10% of the scenes that contain no held-out pair or objects are held out as whole scenes."""
  splits = [world.split_of_scene(scene) for scene in some_scenes("two_object", 4_000)]
  shares = {name: splits.count(name) / 4_000 for name in set(splits)}
  assert shares["pair"] == pytest.approx(1 - (7 / 8) ** 2, abs=0.02)
  assert shares["objects"] == pytest.approx(0.05 * (7 / 8) ** 2, abs=0.01)
  assert shares["scene"] / (shares["scene"] + shares["train"]) == pytest.approx(0.1, abs=0.015)
  never = sum(map(world.is_heldout_rare, world.rare_objects(ScenesConfig())))
  assert never == pytest.approx(200, abs=30)


def test_the_scenes_of_a_small_world_are_all_different():
  config = ScenesConfig(objects=("bell", "key", "fish"), colors=("red", "blue"), rare_objects=2)
  expected = {
    "single_object": 3 * 2 * 4,
    "colors": 3 * 2 * 4,
    "counting": 3 * 2 * 11,
    "two_object": 3 * 4 * 12,
    "position": 3 * 4 * 12,
    "color_attr": 3 * 2 * 12,
    "rare": 2 * 2 * 4,
  }
  seen = set()
  for category, number in expected.items():
    assert number_of_scenes_of(config, category) == number
    keys = {scene_at(config, category, i).facts_key for i in range(number)}
    assert len(keys) == number
    seen |= keys
  assert world.number_of_scenes(config) == len(seen) == 24 + 66 + 144 + 16
  assert world.number_of_scenes(ScenesConfig()) == 635_840


def test_an_image_is_white_but_for_its_icons():
  scene = Scene.parse("blue key top right, red bell bottom left")
  image = drawings.render(scene)
  assert (image.shape, image.dtype) == ((48, 48, 3), np.uint8)
  assert (image[:24, :24] == 255).all()
  assert (image[24:, 24:] == 255).all()
  assert image[36, 12].tolist() == list(COLORS["red"])
  ink = drawings.alpha("key")[..., None] / 255
  expected = 255 * (1 - ink) + np.array(COLORS["blue"]) * ink
  np.testing.assert_allclose(image[:24, 24:], expected, atol=0.51)


@pytest.mark.parametrize("category", CATEGORIES)
def test_boxes_are_those_of_the_ink(category):
  for scene in some_scenes(category, 20):
    for placed in scene.objects:
      ink = (drawings.render(Scene((placed,))) != 255).any(-1)
      (rows,), (columns,) = (np.nonzero(ink.any(axis)) for axis in (1, 0))
      box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
      assert drawings.box(placed) == box


def test_an_outline_in_literals():
  full = np.array(
    [[0, 0, 0, 0, 0], [0, 9, 9, 9, 0], [0, 9, 9, 9, 0], [0, 9, 9, 5, 0], [0, 0, 0, 0, 0]], np.uint8
  )
  assert drawings.outline(full).tolist() == [
    [0, 0, 0, 0, 0],
    [0, 9, 9, 9, 0],
    [0, 9, 0, 9, 0],
    [0, 9, 9, 5, 0],
    [0, 0, 0, 0, 0],
  ]
  assert drawings.outline(full[1:4, 1:4]).tolist() == [[9, 9, 9], [9, 0, 9], [9, 9, 5]]


@pytest.mark.parametrize(
  ("name", "one", "many"),
  [
    ("bell", "a bell", "bells"),
    ("umbrella", "an umbrella", "umbrellas"),
    ("cherries", "cherries", "cherries"),
    ("glasses", "glasses", "glasses"),
    ("scissors", "scissors", "scissors"),
    ("butterfly", "a butterfly", "butterflies"),
    ("leaf", "a leaf", "leaves"),
    ("fish", "a fish", "fish"),
    ("cactus", "a cactus", "cacti"),
  ],
)
def test_articles_and_plurals(name, one, many):
  assert (with_article(name), plural(name)) == (one, many)


def captions(category, key):
  scene = Scene.parse(key)
  return {describe(category, scene, random.Random(seed)).caption for seed in range(200)}


def test_wordings():
  assert captions("single_object", "red bell top left") == {
    "a bell at the top left",
    "a bell in the top left corner",
    "there is a bell in the top left corner",
    "at the top left stands a bell",
    "an image with a bell at the top left",
  }
  glasses = captions("colors", "red glasses top left")
  plurals = {"there are red glasses in the top left corner", "at the top left stand red glasses"}
  assert plurals < glasses
  three = "red bell bottom left, red bell top left, red bell top right"
  assert {"we see three bells", "we see three red bells"} < captions("counting", three)
  two = "blue key top right, red bell top left"
  assert {"a bell and a key", "a key and a bell"} < captions("two_object", two)
  related = {"a bell left of a key", "a blue key to the right of a red bell"}
  assert related < captions("position", two)
  assert {"a red bell and a blue key", "a blue key and a red bell"} < captions("color_attr", two)
  for category in CATEGORIES:
    (scene,) = some_scenes(category, 1)
    assert len(captions(category, scene.facts_key)) >= 4


@pytest.mark.parametrize("category", CATEGORIES)
def test_what_a_caption_says_holds_in_its_scene_and_is_in_its_words(category):
  named = set()
  for i, scene in enumerate(some_scenes(category, 200)):
    text = describe(category, scene, random.Random(i))
    objects = {placed.object: placed for placed in scene.objects}
    counts = [sum(p.object == claim["class"] for p in scene.objects) for claim in text.include]
    assert [claim["count"] for claim in text.include] == counts
    assert sum(counts) == len(scene.objects)
    assert text.caption == text.caption.lower()
    assert not text.caption.endswith(".")
    for claim in text.include:
      placed = objects[claim["class"]]
      name = plural(placed.object) if claim["count"] > 1 else placed.object
      assert f"{claim.get('color', '')} {name}".strip() in text.caption
      assert claim.get("color", placed.color) == placed.color
      assert claim.get("place", placed.place) == placed.place
      assert ("place" in claim) == (placed.place in text.caption)
      named |= set(claim)
      if "position" in claim:
        relation, other = claim["position"]
        other = objects[text.include[other]["class"]]
        assert holds(placed.place, relation, other.place)
    colored = any(f" {color} " in f" {text.caption} " for color in COLORS)
    assert colored == any("color" in claim for claim in text.include)
    more = [{"class": scene.objects[0].object, "count": len(scene.objects) + 1}]
    assert text.exclude == (more if category == "counting" else [])
  expected = {
    "single_object": {"place"},
    "colors": {"color", "place"},
    "counting": {"color"},
    "two_object": set(),
    "position": {"color", "position"},
    "color_attr": {"color"},
    "rare": {"color", "place"},
  }
  assert named == {"class", "count", *expected[category]}


def holds(place, relation, other):
  """Returns whether a relation between two places holds, judged by the words of the places."""
  words = {"left of": ("left", "right"), "right of": ("right", "left")}
  words |= {"above": ("top", "bottom"), "below": ("bottom", "top")}
  one, two = words[relation]
  return one in place and two in other
