import numpy as np
import pytest

from benchmarks.evidence import scene_judge
from examples.scenes import drawings, world
from examples.scenes.judge import errors as judge_errors
from examples.scenes.judge import judge
from examples.scenes.judge.facts import UNKNOWN
from examples.scenes.options import COLORS
from examples.scenes.world import Placed, Scene

SCENE = Scene.parse("blue key top right, red bell bottom left")


@pytest.fixture(scope="module")
def made():
  """Draws scenes of all categories; returns images and facts."""
  made, facts = scene_judge.make_scenes(210, seed=3)
  return np.stack([drawings.render(scene) for scene in made]), facts


def test_all_objects_of_a_scene_are_found_with_their_colors_places_and_boxes():
  (things,) = judge.find_objects(drawings.render(SCENE)[None])
  assert [(x.name, x.color, x.place) for x in things] == [
    ("key", "blue", "top right"),
    ("bell", "red", "bottom left"),
  ]
  for thing, placed in zip(things, SCENE.objects):
    assert thing.score == pytest.approx(1, abs=1e-5)
    assert np.abs(np.array(thing.box) - drawings.box(placed)).max() <= 1  # The edges are faint.


def test_equal_images_and_cells_are_judged_once(monkeypatch):
  moved = Scene.parse("blue key bottom left")  # A cell of SCENE at another place.
  images = np.stack([drawings.render(scene) for scene in (SCENE, moved, SCENE)])
  each = [judge.find_objects(image[None])[0] for image in images]
  looked_at, find = [], judge._find_in_cells

  def counted(cells, *args):
    looked_at.append(len(cells))
    return find(cells, *args)

  monkeypatch.setattr(judge, "_find_in_cells", counted)
  together = judge.find_objects(images)
  assert [[(x.name, x.color, x.place, x.box) for x in found] for found in together] == [
    [(x.name, x.color, x.place, x.box) for x in found] for found in each
  ]
  assert [x.place for x in together[1]] == ["bottom left"]
  assert looked_at == [3]  # The key, the bell, and a blank cell.


@pytest.mark.parametrize("style", ["filled", pytest.param("outlined", marks=pytest.mark.slow)])
def test_every_object_of_the_world_is_found_as_itself_in_every_color(style):
  names, colors = list(world.ICONS), list(COLORS)
  images, expected = [], []
  for start in range(0, len(names) - 3, 4):
    placed = [
      Placed(name, colors[(start + i) % len(colors)], place)
      for i, (name, place) in enumerate(zip(names[start : start + 4], world.PLACES))
    ]
    images.append(drawings.render(Scene(tuple(placed)), style))
    expected.append([(x.object, x.color) for x in placed])
  found = judge.find_objects(np.stack(images), style)
  assert [[(x.name, x.color) for x in things] for things in found] == expected


@pytest.mark.parametrize(
  "name",
  [
    "as rendered",
    "strong mixture",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("blur 1.2", "noise 30", "halved", "JPEG 40")
    ),
  ],
)
def test_real_scenes_are_judged_right_and_those_with_one_fact_changed_wrong(made, name):
  images, facts = made
  rng = np.random.default_rng(4)
  changed = scene_judge.degraded(images, rng, **scene_judge.DEGRADED[name])
  errors = judge_errors.measure(changed, facts, seed=5)
  assert errors["images"] == 210
  # These images are worse than those of usable tokenizers: colors off by 25 of 255, blots, 16 dB.
  assert errors["real"] >= (0.94 if name in ("strong mixture", "JPEG 40") else 0.98)
  assert set(errors["changed"]) == {"object", "color", "count", "relation", "place"}
  for entry in errors["changed"].values():
    assert entry["captions"] >= 30
    assert entry["right"] <= 0.02


def test_an_object_off_the_grid_is_none():
  image = drawings.render(Scene.parse("red bell top left"))
  moved = np.roll(image, (12, 12), (0, 1))
  facts = {"include": [{"class": "bell", "count": 1}]}
  assert judge.judge(image, facts).correct
  verdict = judge.judge(moved, facts)
  assert not verdict.correct
  assert {thing.name for thing in verdict.found} == {UNKNOWN}


@pytest.mark.parametrize(
  ("ink", "color"), [(0.3, UNKNOWN), (0.45, UNKNOWN), (0.6, "red"), (1, "red")]
)
def test_a_pale_object_has_no_clear_color(ink, color):
  heart = Scene.parse("red heart top left")
  image = 255 - ink * (255 - drawings.render(heart).astype(np.float32))
  (thing,) = judge.find_objects(image.round().astype(np.uint8)[None])[0]
  assert (thing.name, thing.color) == ("heart", color)


def test_a_blot_beside_the_object_makes_an_image_wrong_and_a_speck_does_not():
  image = drawings.render(Scene.parse("red bell top left"))
  facts = {"include": [{"class": "bell", "count": 1, "color": "red"}]}
  speck, blot = image.copy(), image.copy()
  speck[30:34, 30:34] = (0, 50, 230)
  blot[30:38, 30:38] = (0, 50, 230)
  assert judge.judge(speck, facts).correct
  verdict = judge.judge(blot, facts)
  assert verdict.holds == {"object": False, "count": False, "color": True}
  assert verdict.reason == "expected 0 unknown, found 1"
