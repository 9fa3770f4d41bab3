import numpy as np
import pytest

from benchmarks.evidence import scene_recount
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from examples.scenes import instruct, make_instructions, source, world
from examples.scenes.drawings import render
from examples.scenes.instructions import EDITS
from examples.scenes.options import ScenesConfig
from examples.scenes.world import Placed, Scene

CONFIG = ScenesConfig(rare_objects=1_550)


def test_true_images_are_correct_for_their_own_caption_only():
  pairs = [source.pair(CONFIG, "heldout", i) for i in range(24)]
  shown = scene_recount.objects_of(np.stack([render(Scene.parse(pair.image)) for pair in pairs]))
  clauses = [pair.facts["include"] for pair in pairs]
  assert all(map(scene_recount.is_correct, shown, clauses))
  others = map(scene_recount.is_correct, shown, clauses[1:] + clauses[:1])
  assert sum(others) < 3


LEFT = [{"class": "bell", "count": 1, "position": ["left of", 1]}, {"class": "key", "count": 1}]


@pytest.mark.parametrize(
  ("clauses", "objects", "right"),
  [
    ([{"class": "bell", "count": 2}], ["red bell top left", "blue bell top right"], True),
    ([{"class": "bell", "count": 2}], ["red bell top left"], False),
    ([{"class": "bell", "count": 1, "color": "red"}], ["blue bell top left"], False),
    ([{"class": "bell", "count": 1, "place": "top left"}], ["red bell top right"], False),
    ([{"class": "bell", "count": 1}], ["red bell top left", "red key top right"], False),
    (LEFT, ["red key bottom right", "red bell top left"], True),
    (LEFT, ["red key bottom left", "red bell top left"], False),
    (
      [{"class": "bell", "count": 1, "position": ["above", 1]}, {"class": "bell", "count": 1}],
      ["red bell bottom left", "blue bell top left"],
      True,
    ),
  ],
)
def test_objects_are_assigned_to_the_clauses(clauses, objects, right):
  image = render(Scene.parse(", ".join(objects)))
  [shown] = scene_recount.objects_of(image[None])
  assert scene_recount.is_correct(shown, clauses) == right


def test_rare_objects_and_blank_quarters_are_told_apart():
  name = world.rare_objects(CONFIG)[-1]
  image = render(Scene((Placed(name, "cyan", "bottom left"),)))
  noisy = np.clip(image + np.random.default_rng(0).normal(0, 20, image.shape), 0, 255)
  assert scene_recount.objects_of(noisy.astype(np.uint8)[None]) == [[(name, "cyan", "bottom left")]]


def test_both_counts_of_a_card_are_compared(tmp_path):
  pairs = [source.pair(CONFIG, "heldout", i) for i in range(4)]
  images = np.stack([render(Scene.parse(pair.image)) for pair in pairs])
  rows = [
    {"group": group, "facts": pair.facts, "right": right}
    for pair, group, right in zip(pairs, "aabb", (True, False, True, True))
  ]
  write_json(tmp_path / "verdicts.json", rows)
  np.savez_compressed(tmp_path / "samples.npz", images=images)
  lines = scene_recount.count("card", str(tmp_path)).splitlines()[2:]
  assert lines == ["| a (2) | 50.0% | 100.0% | 0 | 1 |", "| b (2) | 100.0% | 100.0% | 0 | 0 |"]
  np.savez_compressed(tmp_path / "samples.npz", images=images[:3])
  with pytest.raises(UserError, match="has 4 verdicts and 3 images; measure again"):
    scene_recount.count("card", str(tmp_path))


@pytest.mark.slow
def test_edits_of_the_bundled_model_are_counted(monkeypatch, tmp_path):
  monkeypatch.setattr(scene_recount, "EDITS", 8)
  make_instructions.write(tmp_path, make_instructions.options_of(), tuple(EDITS), 1, 8)
  monkeypatch.setattr(instruct, "TASKS", str(tmp_path / "tasks.yaml"))
  table = [
    line.strip("| ").split(" | ")
    for line in scene_recount.count("edits", "scenes-instruct").splitlines()[2:]
  ]
  assert [name for name, *_ in table] == ["recolor (8)", "remove (8)", "mirror (8)", "add (8)"]
  for _, judge, nearest, *_ in table:
    assert float(judge.rstrip("%")) >= 25
    assert abs(float(judge.rstrip("%")) - float(nearest.rstrip("%"))) <= 12.5
