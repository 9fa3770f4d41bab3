import collections
import itertools
import random
import re

import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from examples.scenes import questions, source
from examples.scenes.captions import PLURALS, with_article
from examples.scenes.drawings import render
from examples.scenes.instructions import (
  CAPTIONED,
  EDITS,
  HIDDEN,
  QUESTIONS,
  TASKS,
  located,
  may_be_trained,
  record,
)
from examples.scenes.options import COLORS, COMMON, RARE, ScenesConfig
from examples.scenes.world import (
  HELDOUT_COLOR,
  ICONS,
  KINDS,
  Placed,
  Scene,
  is_heldout_objects,
  is_heldout_rare,
  rare_color,
  rare_place,
  split_of_scene,
)
from tests.examples.scenes.records import records
from tests.refusals import refused

CONFIG = ScenesConfig(rare_objects=100)
SINGULARS = {many: name for name, many in PLURALS.items()}


@pytest.fixture(scope="module")
def made():
  """Makes the first 200 records of each task and split."""
  return {
    (task, split): records(CONFIG, task, split, 200)
    for task in TASKS
    for split in ("train", "heldout")
  }


def last_scene(record) -> Scene:
  objects = record.facts["objects"]
  return Scene.of([Placed(x["class"], x["color"], x["place"]) for x in objects])


def last_image(record) -> np.ndarray:
  return list(record.images.values())[-1]


def word_of(text: str) -> str:
  """Returns the name, in the singular, of the only object in a text."""
  words = text.rstrip("?").split()
  for length in range(5, 0, -1):
    for start in range(len(words) - length + 1):
      name = " ".join(words[start : start + length])
      for singular in (name, SINGULARS.get(name, ""), name.removesuffix("s")):
        if singular in ICONS:
          return singular
  raise AssertionError(text)


def test_records_of_literal_scenes():
  assert record(CONFIG, "count", "train", 0).key == "scenes/count/train/0000000"
  scene = Scene.parse("red bell top left, blue key bottom left, blue key bottom right")
  rng = random.Random(0)
  for _ in range(20):
    asked = questions.ask_count(scene, 2, rng)
    assert (word_of(asked.question), asked.answer) == ("key", "two")
    assert questions.ask_count(scene, 3, rng) is None
    # Two keys are below the bell, so only the bell can be the reference.
    assert "right of the bell" in questions.ask_relation(scene, rng).question
  apart = Scene.parse("red bell top left, blue key bottom right")
  asked = {questions.ask_relation(apart, rng).question for _ in range(200)}
  assert {"What is left of the key?", "What is to the left of the key?"} < asked
  assert {"Which object is above the key?", "What stands below the bell?"} < asked
  assert not any("left of the bell" in question for question in asked)


def test_no_answer_is_given_to_an_ambiguous_question():
  rng = random.Random(0)
  two_colors = Scene.parse("red bell top left, blue bell bottom right")
  assert questions.ask_color(two_colors, rng) is None
  assert questions.ask_relation(two_colors, rng) is None  # The bell is ambiguous.
  beside = Scene.parse("red bell top left, blue cat bottom left, red key top right")
  for _ in range(100):
    asked = questions.ask_relation(beside, rng)
    # Ambiguous: both the bell and the cat are left of the key.
    assert not re.search("left of the key", asked.question)


@pytest.mark.parametrize("task", TASKS)
def test_a_record_depends_on_seed_task_split_and_index_alone(task, made):
  other = ScenesConfig(rare_objects=100, train=7, bank=3)
  for split, index in itertools.product(("train", "heldout"), (0, 17, 199)):
    one, again = made[task, split][index], record(other, task, split, index)
    assert (one.key, one.group, one.texts, one.facts) == (
      again.key, again.group, again.texts, again.facts,
    )  # fmt: skip
    assert list(one.images) == list(again.images)
    for image, same in zip(one.images.values(), again.images.values()):
      np.testing.assert_array_equal(image, same)
  seed = [record(ScenesConfig(seed=1), task, "train", i).texts for i in range(20)]
  assert seed != [one.texts for one in made[task, "train"][:20]]
  keys = [one.key for split in ("train", "heldout") for one in made[task, split]]
  assert len(set(keys)) == 400


@pytest.mark.parametrize("task", TASKS)
def test_images_show_the_scene_of_the_facts(task, made):
  for split in ("train", "heldout"):
    for one in made[task, split]:
      np.testing.assert_array_equal(last_image(one), render(last_scene(one)))
      if task in EDITS:
        np.testing.assert_array_equal(one.images["before"], render(Scene.parse(one.group)))
        assert (one.images["before"] != one.images["after"]).any()


def test_edits_do_what_the_instruction_says(made):
  for split in ("train", "heldout"):
    for one in made["recolor", split]:
      words = one.texts["instruction"].split()
      (color,) = (word for word in words if word in COLORS)
      name = word_of(one.texts["instruction"])
      expected = [
        (x.object, color if x.object == name else x.color, x.place)
        for x in Scene.parse(one.group).objects
      ]
      assert expected == [(x["class"], x["color"], x["place"]) for x in one.facts["objects"]]
    for one in made["remove", split]:
      name = word_of(one.texts["instruction"])
      left = [x for x in Scene.parse(one.group).objects if x.object != name]
      assert Scene.of(left) == last_scene(one)
      assert 0 < len(left) < len(Scene.parse(one.group).objects)
    for one in made["mirror", split]:
      axis = 0 if "top" in one.texts["instruction"] else 1
      np.testing.assert_array_equal(np.roll(one.images["before"], 24, axis), one.images["after"])
    for one in made["add", split]:
      before, after = (set(x.objects) for x in (Scene.parse(one.group), last_scene(one)))
      (added,) = after - before
      assert before < after
      assert with_article(added.object, added.color) in one.texts["instruction"]
      if "corner" in one.texts["instruction"] or " at the " in one.texts["instruction"]:
        assert added.place in one.texts["instruction"]


def test_answers_are_balanced(made):
  for split in ("train", "heldout"):
    for task, answers in (("exists", 2), ("count", 4)):
      counts = collections.Counter(one.texts["answer"] for one in made[task, split])
      assert set(counts.values()) == {200 // answers}
    assert len({one.texts["answer"] for one in made["color", split]}) == len(COLORS)
  first = [one.texts["answer"] for one in made["exists", "train"][::2]]
  # In each pair of records, "yes" and "no" have a random order.
  assert 30 < first.count("yes") < 70


@pytest.mark.parametrize("task", [*QUESTIONS, *EDITS])
def test_the_wording_varies(task, made):
  names = sorted({*ICONS, *SINGULARS, *(f"{x}s" for x in COMMON)}, key=len, reverse=True)
  thing = re.compile(rf"\b(({'|'.join(COLORS)}) )?({'|'.join(names)})\b")
  text = "instruction" if task in EDITS else "question"
  wordings = collections.Counter(thing.sub("X", one.texts[text]) for one in made[task, "train"])
  assert len(wordings) >= 4
  assert max(wordings.values()) <= 70


def trained_parts(scene: Scene) -> set:
  """Returns the held-out parts of a scene: pairs of object and color, two objects, rare objects."""
  found = set()
  for x in scene.objects:
    if x.object in COMMON and HELDOUT_COLOR[x.object] == x.color:
      found.add(("pair", x.object))
    if x.object in RARE and is_heldout_rare(x.object):
      found.add(("rare", x.object))
    if x.object in RARE and (x.color, x.place) != (rare_color(x.object), rare_place(x.object)):
      found.add(("bank", x.object))
  for a, b in itertools.combinations(scene.objects, 2):
    if {a.object, b.object} <= set(COMMON) and a.object != b.object:
      if is_heldout_objects(a.object, b.object):
        found.add(("objects", a.object, b.object))
    elif a.object != b.object:
      found.add(("rare beside another", a.object, b.object))
  return found


@pytest.mark.parametrize("task", TASKS)
def test_training_records_show_nothing_that_is_held_out(task, made):
  heldout = {one.group for other in TASKS for one in made[other, "heldout"]}
  for one in made[task, "train"]:
    for scene in (Scene.parse(one.group), last_scene(one)):
      parts = trained_parts(scene)
      if task in EDITS and any(x.object in RARE for x in scene.objects):
        parts = {part for part in parts if part[0] not in ("bank", "rare beside another")}
      else:
        assert split_of_scene(scene) == "train"
      assert not parts
      assert scene.facts_key not in heldout
    assert one.facts["heldout"] == ""
  for one in made[task, "heldout"]:
    assert one.facts["heldout"] == split_of_scene(Scene.parse(one.group))
    assert one.facts["heldout"] in KINDS


def test_a_rare_object_is_trained_alone():
  name = next(x for x in RARE if not is_heldout_rare(x))
  alone = Placed(name, rare_color(name), rare_place(name))
  assert may_be_trained(Scene((alone,)))
  place = next(p for p in ("top left", "top right") if p != alone.place)
  beside = Placed("bell", HELDOUT_COLOR["bell"], place)
  # `split_of_scene` considers only the rare object.
  assert split_of_scene(Scene.of([alone, beside])) == "train"
  assert not may_be_trained(Scene.of([alone, beside]))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captioned_records_are_those_of_the_source(split, made):
  for task in CAPTIONED:
    for i, one in enumerate(made[task, split]):
      pair = source.pair(CONFIG, split, i)
      assert (one.texts["caption"], one.group) == (pair.caption, pair.image)
      assert one.facts["objects"] == pair.facts["objects"]
      assert one.facts["tag"] == pair.facts["tag"]


def test_a_located_caption():
  objects = [Placed("bell", "red", "top left"), Placed("key", "blue", "bottom right")]
  assert located("a bell and a key", objects) == (
    "a bell and a key with bell at location (3, 2) -> (21, 23), "
    "key at location (25, 30) -> (48, 42)"
  )


def test_locations_are_boxes_of_ink(made):
  form = r"(.+?) at location \((\d+), (\d+)\) -> \((\d+), (\d+)\)"
  for one in made["located", "heldout"]:
    caption, text = one.texts["caption"], one.texts["located"]
    assert text.startswith(caption + " with ")
    entries = text.removeprefix(caption + " with ").replace("), ", ");").split(";")
    covered = np.zeros((48, 48), bool)
    names = []
    for entry in entries:
      name, *box = re.fullmatch(form, entry).groups()
      x0, y0, x1, y1 = map(int, box)
      ink = (one.images["image"] != 255).any(-1)[y0:y1, x0:x1]
      for line in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
        assert line.any()  # The object touches each side of its box.
      covered[y0:y1, x0:x1] = True
      names.append(name)
    assert names == [x.object for x in Scene.parse(one.group).objects]
    assert (one.images["image"][~covered] == 255).all()


def test_one_half_is_hidden_and_shows_an_object(made):
  halves = collections.Counter()
  for one in made["complete", "train"]:
    left, top, right, bottom = one.facts["box"]
    halves[left, top, right, bottom] += 1
    inside = np.zeros((48, 48), bool)
    inside[top:bottom, left:right] = True
    given, image = one.images["given"], one.images["image"]
    assert inside.sum() == 48 * 24
    assert (given[inside] == HIDDEN).all()
    np.testing.assert_array_equal(given[~inside], image[~inside])
    assert (image[inside] != 255).any()
    kept = [x for x in one.facts["objects"] if not inside[x["box"][1], x["box"][0]]]
    assert one.facts["kept"] == [{k: x[k] for k in ("class", "color", "place")} for x in kept]
  assert len(halves) == 4


def test_an_unknown_task_is_named():
  with refused(UserError, "rotate"):
    record(CONFIG, "rotate", "train", 0)
