import pytest

from examples.scenes.judge.baselines import Known, TrainingScenes, claims_of
from examples.scenes.judge.clauses import parse
from examples.scenes.world import Scene


def record(caption: str, scene: str) -> tuple[str, dict]:
  """Returns a training document with a caption and a scene, such as "red bell top left, ..."."""
  objects = [
    {"class": p.object, "color": p.color, "place": p.place} for p in Scene.parse(scene).objects
  ]
  return caption, {"include": parse(caption), "objects": objects}


SHOWN = [
  record("two hearts", "red heart top left, red heart bottom left"),
  record("a bell left of a key", "green bell top left, blue key top right"),
  record("a star at the top left", "blue star top left"),
]
TRAINED = TrainingScenes(SHOWN)


@pytest.mark.parametrize(
  ("caption", "expected"),
  [
    ("two hearts", Known(caption=True, claims=True, image=True)),
    ("we see two hearts", Known(caption=False, claims=True, image=True)),
    ("two red hearts", Known(caption=False, claims=False, image=True)),
    ("two blue hearts", Known(caption=False, claims=False, image=False)),
    ("three hearts", Known(caption=False, claims=False, image=False)),
    ("a key right of a bell", Known(caption=False, claims=True, image=True)),
    ("a key left of a bell", Known(caption=False, claims=False, image=False)),
    ("a green bell to the left of a blue key", Known(caption=False, claims=False, image=True)),
    ("a blue bell left of a green key", Known(caption=False, claims=False, image=False)),
    ("a star", Known(caption=False, claims=False, image=True)),
    ("a star in the bottom right corner", Known(caption=False, claims=False, image=False)),
    # No image shows only a bell; that scene also has a key.
    ("a bell", Known(caption=False, claims=False, image=False)),
  ],
)
def test_words_claims_and_images_are_known_apart(caption, expected):
  assert TRAINED.known(caption, {"include": parse(caption)}) == expected


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("a bell above a key", "under a bell stands a key"),
    ("a bell and a key", "an image of a key and a bell"),
    ("a red bell left of a key", "a key to the right of a red bell"),
  ],
)
def test_equal_claims_in_other_words_are_equal(one, other):
  assert claims_of(parse(one)) == claims_of(parse(other))


def test_other_claims_are_not_equal():
  captions = [
    "a bell above a key", "a bell below a key", "a bell left of a key", "a bell and a key",
    "a red bell above a key", "a bell above a red key", "a bell", "two bells",
    "a bell at the top left",
  ]  # fmt: skip
  assert len({claims_of(parse(caption)) for caption in captions}) == len(captions)
