import numpy as np
import pytest

from cm3leon_jax.data.instructions.records import Record
from examples.scenes.drawings import render
from examples.scenes.instructions import EDITS, TASKS, TEXT_TASKS, record
from examples.scenes.judge.answers import (
  answer_of,
  is_right,
  judge_images,
  judge_objects,
  majority_answers,
  mistakes,
)
from examples.scenes.judge.errors import changed_facts
from examples.scenes.judge.judge import find_objects
from examples.scenes.options import COLORS, COMMON, ScenesConfig
from examples.scenes.world import Scene
from tests.examples.scenes.records import records

CONFIG = ScenesConfig(rare_objects=100)
IMAGE_TASKS = tuple(task for task in TASKS if task not in TEXT_TASKS)
OTHERS = {"count": ("one", "two", "three", "four"), "color": tuple(COLORS), "exists": ("yes", "no")}


@pytest.fixture(scope="module", params=[20, pytest.param(100, marks=pytest.mark.slow)])
def made(request):
  return {task: of_both_splits(task, request.param) for task in TASKS}


def of_both_splits(task: str, count: int) -> list[Record]:
  return [*records(CONFIG, task, "train", count), *records(CONFIG, task, "heldout", count)]


@pytest.fixture(scope="module")
def found(made):
  """Returns the objects that the judge finds in the true images of each task with images."""
  return {task: find_objects(targets(made[task])) for task in IMAGE_TASKS}


def targets(of) -> np.ndarray:
  return np.stack([list(one.images.values())[-1] for one in of])


def question(task: str, answer: str) -> Record:
  return Record("k", "g", {"question": "?", "answer": answer}, {}, {"task": task})


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_true_answers_are_right(task, made):
  assert all(is_right(one, answer_of(one)) for one in made[task])


@pytest.mark.parametrize("task", ["count", "color", "exists", "relation"])
def test_every_other_answer_is_wrong(task, made):
  for one in made[task]:
    for other in OTHERS.get(task, tuple(COMMON)):
      assert is_right(one, other) == (other == one.texts["answer"])
    assert not is_right(one, "")
    assert not is_right(one, "maybe")


@pytest.mark.parametrize(
  ("task", "answer", "right", "wrong"),
  [
    ("count", "two", ("2", "Two.", " two "), ("22", "twos", "one two", "2 or 3")),
    ("exists", "yes", ("Yes.", "yes, there is a cat", "YES"), ("no", "not yes", "yesterday")),
    ("exists", "no", ("No", "no, I see none"), ("yes", "none", "know")),
    ("relation", "bell", ("a bell", "The bell."), ("bells", "a bell and a key", "red bell")),
  ],
)
def test_spellings_of_an_answer(task, answer, right, wrong):
  one = question(task, answer)
  assert all(is_right(one, text) for text in right)
  assert not any(is_right(one, text) for text in wrong)


def test_a_caption_may_name_other_facts_of_the_image():
  facts = {"task": "describe", "objects": [
    {"class": "bell", "color": "red", "place": "top left", "box": [0, 0, 1, 1]},
    {"class": "key", "color": "blue", "place": "bottom right", "box": [0, 0, 1, 1]},
  ]}  # fmt: skip
  one = Record("k", "g", {"caption": "a bell and a key"}, {}, facts)
  for caption in (
    "a key and a red bell",
    "a red bell at the top left and a blue key in the bottom right corner",
    "there is a bell above a blue key",
  ):
    assert is_right(one, caption)
  for caption in (
    "a bell",  # One object too few.
    "two bells and a key",
    "a bell and a key and a cat",
    "a blue bell and a key",
    "a bell at the top right and a key",
    "a bell below a key",
    "a bell and a pear",
    "a bell and a dragon",
    "",
  ):
    assert not is_right(one, caption)


@pytest.mark.parametrize("task", IMAGE_TASKS)
def test_true_images_are_right_and_hold_all_facts(task, made, found):
  verdicts = [judge_objects(one.facts, some) for one, some in zip(made[task], found[task])]
  assert len(verdicts) == len(made[task]) >= 40
  for verdict in verdicts:
    assert verdict.correct, verdict.reason
    assert all(verdict.holds.values())
    assert ("kept" in verdict.holds) == (task in EDITS or task == "complete")
    assert ("instruction" in verdict.holds) == (task in EDITS)
  assert judge_images(made[task][:10], targets(made[task][:10])) == verdicts[:10]
  first, other = targets(made[task][:1])[0], made[task][1].facts
  assert mistakes(first, made[task][0].facts) == ""
  assert mistakes(first, other) != ""


@pytest.mark.parametrize("task", IMAGE_TASKS)
def test_images_with_one_fact_changed_are_wrong(task, made, found):
  """Changes one fact of a record instead of its image: class, color, place, number or relation."""
  rng, judged = np.random.default_rng(0), 0
  for one, objects in zip(made[task], found[task]):
    for facts in changed_facts(one.facts, rng).values():
      assert not judge_objects(facts, objects).correct
      judged += 1
  assert judged > 2 * len(made[task])


@pytest.mark.parametrize("task", EDITS)
def test_an_unchanged_image_keeps_everything_and_follows_no_instruction(task, made):
  before = np.stack([one.images["before"] for one in made[task]])
  for one, verdict in zip(made[task], judge_images(made[task], before)):
    assert not verdict.correct
    assert verdict.holds["kept"]
    assert not verdict.holds["instruction"], one.texts


@pytest.mark.parametrize("task", ["recolor", "remove", "add"])
def test_an_edit_that_also_changes_another_object_does_not_keep_it(task, made):
  wrong, of = [], []
  for one in made[task]:
    objects = list(Scene.parse(scene_key(one)).objects)
    index = next((i for i, x in enumerate(objects) if x.object not in one.facts["touched"]), None)
    if index is not None:
      color = "red" if objects[index].color != "red" else "blue"
      objects[index] = type(objects[index])(objects[index].object, color, objects[index].place)
      wrong.append(render(Scene.of(objects)))
      of.append(one)
  assert len(of) > 0.4 * len(made[task])
  for verdict in judge_images(of, np.stack(wrong)):
    assert verdict.holds["instruction"]
    assert not verdict.holds["kept"]
    assert not verdict.correct


def scene_key(one: Record) -> str:
  return ", ".join(f"{x['color']} {x['class']} {x['place']}" for x in one.facts["objects"])


def test_a_completion_keeps_the_given_half(made):
  """Rejects a scene that fits the caption but changes the given half."""
  one = next(
    one
    for one in made["complete"]
    if one.facts["tag"] == "two_object" and one.facts["kept"] and len(one.facts["kept"]) == 1
  )
  scene = Scene.parse(scene_key(one))
  colors = {x.object: next(c for c in COLORS if c != x.color) for x in scene.objects}
  free = [type(x)(x.object, colors[x.object], x.place) for x in scene.objects]
  kept = one.facts["kept"][0]["class"]
  given = [x if x.object == kept else y for x, y in zip(scene.objects, free)]
  verdicts = judge_images([one, one], np.stack([render(Scene.of(x)) for x in (free, given)]))
  assert [verdict.correct for verdict in verdicts] == [False, True]
  assert verdicts[0].reason == "a fact that had to stay does not hold"


def test_an_object_may_be_added_at_every_place_where_its_relation_holds():
  found = 0
  for index in range(300):
    one = record(CONFIG, "add", "train", index)
    scene = Scene.parse(one.group)
    if "above the" not in one.texts["instruction"] or len(scene.objects) != 1:
      continue
    found += 1
    added = next(x for x in one.facts["objects"] if x["class"] != scene.objects[0].object)
    places = ("top left", "top right", "bottom left", "bottom right")
    free = [place for place in places if place != scene.objects[0].place]
    images = [
      render(Scene.parse(f"{scene.facts_key}, {added['color']} {added['class']} {place}"))
      for place in free
    ]
    verdicts = judge_images([one] * 3, np.stack(images))
    assert [x.correct for x in verdicts] == ["top" in place for place in free]
    assert [x.holds["instruction"] for x in verdicts] == ["top" in place for place in free]
  assert found >= 3


def test_the_majority_answer_of_each_task(made):
  of = [question("color", "red"), question("color", "red"), question("color", "blue")]
  of += [question("exists", "yes"), question("exists", "no")]
  assert majority_answers(of) == {"color": "red", "exists": "no"}
  everything = [one for records_of_task in made.values() for one in records_of_task]
  majority = majority_answers(everything)
  assert set(majority) == set(TEXT_TASKS)
  shares = {t: np.mean([is_right(one, text) for one in made[t]]) for t, text in majority.items()}
  assert (shares["count"], shares["exists"]) == (0.25, 0.5)
  assert max(shares["color"], shares["relation"]) < 0.25
  assert shares["describe"] < 0.05
