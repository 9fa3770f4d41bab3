import collections
import dataclasses

import numpy as np
import pytest

from benchmarks import experiment, scene_style, scene_style_table
from benchmarks.scene_style import Asked, ask, classify, draw, known, overrides_of, recognized
from cm3leon_jax.config import UserError
from cm3leon_jax.configs import scenes as config_scenes
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.scenes import world
from cm3leon_jax.scenes.world import Placed, Scene
from cm3leon_jax.settings import settings_from_config
from tests.refusals import refused

SETTINGS = settings_from_config(config_scenes.get_config())
HEART = Asked("common", Placed("heart", "red", "top left"), "a red heart")


@pytest.fixture(scope="module")
def asked():
  trained = collections.Counter(world.rare_objects(SETTINGS.scenes))
  return ask(SETTINGS.scenes, trained, 8)


def test_scenes_of_each_group_are_held_out_and_not_in_the_bank(asked):
  assert [list(scene_style.GROUPS).index(one.group) for one in asked] == [0] * 8 + [1] * 8 + [2] * 8
  bank = set(world.bank_scenes(SETTINGS.scenes)[: SETTINGS.scenes.bank])
  shown = {(p.object, p.color) for scene in bank for p in scene.objects}
  splits = collections.Counter()
  for one in asked:
    scene = Scene((one.placed,))
    splits[one.group, world.split_of_scene(scene)] += 1
    assert (one.placed.object, one.placed.color) not in shown
    assert one.placed.color in one.caption
    assert scene_style.is_clear(one.placed.object)
    assert "outline" not in one.caption
    if one.group == "once":
      assert one.placed.color != world.rare_color(one.placed.object)
  assert splits == {("unseen", "rare"): 8, ("once", "bank"): 8, ("common", "scene"): 8}


def test_objects_that_training_shows_twice_are_not_in_the_group_of_once():
  trained = collections.Counter({"abacus": 2})
  assert {one.group for one in ask(SETTINGS.scenes, trained, 5)} == {"unseen", "common"}


def test_thin_icons_are_not_asked_for():
  assert scene_style.is_clear("heart")
  assert not scene_style.is_clear("bicycle")


def test_drawings_are_classified_by_their_style_in_any_color_and_place(asked):
  for style in scene_style.STYLES:
    assert classify(draw(asked, style), asked) == [style] * len(asked)
    assert all(recognized(draw(asked, style), asked, style))
    moved = [
      dataclasses.replace(one, placed=Placed(one.placed.object, "green", "bottom right"))
      for one in asked
    ]
    assert classify(draw(moved, style), asked) == [style] * len(asked)
    assert recognized(draw(moved, style), asked, style) == [
      one.placed.place == "bottom right" for one in asked
    ]


def test_a_blank_image_is_in_neither_style():
  blank = np.full((1, 48, 48, 3), 255, np.uint8)
  assert classify(blank, [HEART]) == ["neither"]
  speck = blank.copy()
  speck[0, 12:14, 12:14] = 0
  assert classify(speck, [HEART]) == ["neither"]


def test_a_filled_object_is_not_recognized_as_another_one():
  key = Asked("common", Placed("key", "red", "top left"), "a red key")
  assert recognized(draw([key], "filled"), [key], "filled") == [True]
  assert recognized(draw([key], "filled"), [HEART], "filled") == [False]


def test_known_codes_and_drawings_in_literals():
  """A drawing is an image quarter. 1 2 3 4 is known; 1 2 3 0 is new, but its codes are known."""
  trained = np.array([[1, 2, 0, 0, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
  image = np.array([[0, 0, 1, 2, 0, 0, 3, 4, 1, 2, 0, 0, 3, 0, 0, 9]])
  assert scene_style.cells_of(trained)[0].tolist() == [[1, 2, 3, 4], [0] * 4, [0] * 4, [0] * 4]
  assert known(image, trained) == {"codes": 7 / 8, "drawings": 1 / 3}


def test_only_other_fields_are_overridden():
  assert overrides_of(SETTINGS) == {}
  config = config_scenes.get_config()
  changed = {"seed": 2, "scenes.heldout": 70, "scenes.shares": ()}
  config.update_from_flattened_dict(changed)
  assert overrides_of(settings_from_config(config)) == changed


def test_the_bank_has_the_tokenizers_of_the_run_and_another_style(tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(experiment, "run_stage", lambda *arguments: ran.append(arguments))
  for run in ("a", "b"):
    for name in ("text_tokenizer", "vqgan", "clip"):
      write_json(tmp_path / run / name / "done.json", {"id": f"{run} {name}"})
  bank = tmp_path / "bank"
  for _ in range(2):
    scene_style.prepare_bank(SETTINGS, tmp_path / "a", bank)
  assert [command for command, *_ in ran] == [
    "prepare_data", "encode_documents", "build_neighbors",
  ] * 2  # fmt: skip
  assert {tuple(overrides.items()) for *_, overrides in ran} == {(("scenes.style", "outlined"),)}
  assert (bank / "clip").resolve() == tmp_path / "a" / "clip"
  with refused(UserError):
    scene_style.prepare_bank(SETTINGS, tmp_path / "b", bank)


def measured(*outlined):
  other = [False] * len(outlined)
  names = ("neither", "recognized", "color", "neighbor")
  return {"outlined": list(outlined), **dict.fromkeys(names, other)}


def test_the_table_in_literals():
  yes = {"recognized": [True] * 5, "color": [True] * 5}
  about = {
    "groups": ["unseen"] * 4 + ["common"],
    "objects": ["a", "a", "b", "c", "d"],
    "known": {"codes": 1.0, "drawings": 0.25},
    "classifier": {
      "filled": {"right": [True] * 5, **yes},
      "outlined": {"right": [True, True, True, False, True], **yes},
    },
  }
  runs = []
  for seed in (0, 1):
    outlined = measured(True, True, bool(seed), True, False)
    banks = {"filled": measured(*[False] * 5), "outlined": outlined}
    runs.append({"run": f"run {seed}", "seed": seed, "banks": banks})
  result = scene_style_table.summarize(about, runs, scene_style.GROUPS)
  level = result["groups"]["unseen"]["banks"]["outlined"]["outlined"]
  assert (level["mean"], level["by_run"]) == (0.875, [0.75, 1.0])
  assert 0.5 <= level["low"] < 0.875 < level["high"] <= 1
  text = scene_style_table.markdown(result)
  both = "(best fit is the object 100.0%, place and color correct 100.0%)"
  assert f"correct on 100.0% of the filled images {both}, 80.0% of the outlined" in text
  assert "training has 100.0%, of whole icons 25.0%" in text
  assert "Seeds of the runs: 0, 1." in text
  assert "| rare, never trained (4 of 3 objects) | outlined | 87.5% [" in text
  assert "]; 75.0%, 100.0% |" in text
  # A single object has no confidence interval.
  assert "| common, in another combination (1 of 1 objects) | outlined | 0.0%; 0.0%, 0.0% |" in text
