import dataclasses

import numpy as np
import pytest

from benchmarks.evidence import scene_card, scene_card_table
from cm3leon_jax.config.build import build
from examples.scenes import config as config_scenes
from examples.scenes import source, world
from examples.scenes.drawings import render
from examples.scenes.judge.baselines import TrainingScenes, claims_of
from examples.scenes.options import ScenesConfig
from examples.scenes.world import Scene, split_of_scene

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


@pytest.mark.parametrize(("at", "place"), [*zip(scene_card.MOVES, world.PLACES[1:])])
def test_an_object_at_the_documents_place_is_found_but_not_right(at, place):
  assert scene_card.moved("top left", scene_card.MOVES[at]) == place
  one = next(one for one in scene_card.rare(CONFIG) if one.placed.place == "top left")
  drawn = [one.placed, dataclasses.replace(one.placed, place=place)]
  images = np.stack([render(Scene((shown,))) for shown in drawn])
  verdicts = scene_card.judged([one] * 2, images, [str(drawn[1]), "red bell top left"])
  assert verdicts == [
    {"right": True, "clear": True, "neighbor": True, "object": True},
    {"right": False, "clear": False, "neighbor": False, "object": True},
  ]
  row = scene_card_table.row(verdicts, ["a", "b"])
  assert row["right"]["mean"] == 0.5
  assert scene_card_table.percent(row["object"]) == "100.0%"


def test_each_caption_counts_in_its_set_and_in_the_parts_by_kind():
  groups = ("new claims", "color named", "claims of training")
  of = zip(groups, ("single_object", "counting", "colors"))
  rows = scene_card.rows_of([scene_card.Asked(group, "", {"tag": tag}, "") for group, tag in of])
  assert rows["both rows with claims, one object"] == [0, 2]
  assert rows["new claims, one object"] == rows["new claims"] == [0]
  assert rows["color named, all others"] == rows["color named"] == [1]


def test_bits_are_compared_with_those_after_no_document():
  rows = scene_card_table.bits_rows(
    {"own": np.array([1.0, 2.0]), "none": np.array([2.0, 4.0])}, ["a", "b"]
  )
  assert rows["own"]["mean"] == 1.5
  assert rows["own"]["minus_none"]["mean"] == -1.5
