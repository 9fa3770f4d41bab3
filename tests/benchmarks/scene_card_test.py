import dataclasses

import numpy as np
import pytest

from benchmarks.evidence import scene_card, scene_card_table
from cm3leon_jax.config import build
from examples.scenes import config as config_scenes
from examples.scenes import source, world
from examples.scenes.drawings import render
from examples.scenes.judge.baselines import TrainingScenes, claims_of
from examples.scenes.options import ScenesConfig
from examples.scenes.world import Placed, Scene, split_of_scene

CONFIG = dataclasses.replace(
  build(ScenesConfig, config_scenes.get_config().raw.options, "raw.options"),
  train=3_000,
  heldout=100,
)


@pytest.fixture(scope="module")
def bank():
  shown = world.bank_scenes(CONFIG)[: CONFIG.bank]
  return {(p.object, p.color, p.place) for scene in shown for p in scene.objects}


def test_common_captions_are_held_out_and_sorted_by_what_training_claims():
  trained = TrainingScenes.of_config(CONFIG)
  counts = dict.fromkeys(scene_card.COUNTS, 9)
  asked = scene_card.common(CONFIG, trained, counts)
  groups = [one.group for one in asked]
  assert {group: groups.count(group) for group in groups} == {
    group: 9 for group in counts if "rare" not in group
  }
  claims = {claims_of(source.pair(CONFIG, "train", i).facts["include"]) for i in range(3_000)}
  for one in asked:
    assert split_of_scene(Scene.parse(one.concept)) != "train"
    if "claims" in one.group:
      assert (claims_of(one.facts["include"]) in claims) == (one.group == "claims of training")
    if one.group == "no color named":
      assert not any(color in one.caption.split() for color in CONFIG.colors)


def test_all_rare_objects_are_asked_for_in_a_color_that_the_bank_lacks(bank):
  asked = list(scene_card.rare(CONFIG))
  assert len({one.concept for one in asked}) == len(asked) == 321
  for one in asked:
    assert split_of_scene(Scene((one.placed,))) == "rare"
    shown = {(color, place) for name, color, place in bank if name == one.placed.object}
    assert one.placed.color not in {color for color, _ in shown}
    assert {place for _, place in shown} == set(world.PLACES)


def test_an_image_at_the_neighbors_place_is_told_from_a_right_one():
  one = next(scene_card.rare(CONFIG))
  placed = one.placed
  place = next(place for place in world.PLACES if place != placed.place)
  other = next(color for color in CONFIG.colors if color != placed.color)
  neighbor = Placed(placed.object, other, place)
  drawn = [placed, dataclasses.replace(placed, place=place), neighbor]
  images = np.stack([render(Scene((shown,))) for shown in drawn])
  verdicts = scene_card.judged([one] * 3, images, [str(neighbor)] * 3)
  names = ("right", "clear", "neighbor", "object", "at_neighbor", "copied")
  assert [[found[name] for name in names] for found in verdicts] == [
    [True, True, True, True, False, False],
    [False, False, True, True, True, False],
    [False, False, True, True, True, False],
  ]
  row = scene_card_table.row(verdicts, ["a", "b", "c"])
  assert row["right"]["mean"] == pytest.approx(1 / 3)
  assert scene_card_table.percent(row["neighbor"]) == "100.0%"


def test_bits_are_compared_with_those_after_no_document():
  rows = scene_card_table.bits_rows(
    {"own": np.array([1.0, 2.0]), "none": np.array([2.0, 4.0])}, ["a", "b"]
  )
  assert rows["own"]["mean"] == 1.5
  assert rows["own"]["minus_none"]["mean"] == -1.5
