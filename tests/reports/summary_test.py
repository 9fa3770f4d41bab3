import re

from etils import epath
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.reports import summary
from cm3leon_jax.scenes import headlines


@pytest.mark.parametrize(
  ("found", "expected"),
  [
    ({}, summary.HEADLINES),
    ({"vqgan": {"psnr_db": 20.0}, "evaluation": {}}, summary.HEADLINES),
    ({"vqgan": {"reconstructed_scenes_right": 0.9}}, headlines.SCENE_HEADLINES),
    ({"evaluation": {"scenes": {"gain": {}}}}, headlines.SCENE_HEADLINES),
    ({"evaluation": {"scenes": {"gain": {}}}, "grades": {}}, headlines.SCENE_HEADLINES),
    ({"grades": {"tasks": {}}}, headlines.TUNED_HEADLINES),
    ({"raw": {"counts": {}}, "evaluation": {}}, summary.OWN_HEADLINES),
  ],
)
def test_headlines_are_chosen_by_what_was_judged(found, expected):
  assert summary.headlines(found) == list(expected)


def test_headlines_of_a_tuned_run_are_found_in_its_grades():
  share = {"right": {"share": 0.9, "low": 0.8, "high": 0.95}}
  grades = {
    "tasks": {"exists": {"after": share}, "describe": {"after": share}},
    "means": {"questions": {"after": 0.81}, "edits": {"after": 0.4}, "edits, kept": {"after": 0.9}},
    "gains": {"draw": {"share": 0.0, "low": -0.05, "high": 0.05}},
  }
  found = [summary.judge({"grades": grades}, line) for line in headlines.TUNED_HEADLINES]
  assert [line["value"] for line in found] == [0.81, 0.9, 0.9, 0.4, 0.9, 0.0]
  assert [line["met"] for line in found] == [True, False, True, False, True, False]
  # 0.9 >= 0.85 and 0 >= -0.03 are not met, because the whole interval counts.
  whole = "whole interval"
  assert [line["note"] for line in found] == ["", whole, whole, "", "", whole]


def test_one_guidance_weight_has_no_headline_of_a_gain():
  left_out = set(headlines.SCENE_HEADLINES) - set(
    summary.headlines({"evaluation": {"scenes": {"best": {}}}})
  )
  assert [line.path for line in left_out] == ["evaluation.scenes.gain.share"]


def test_a_share_of_one_scene_has_no_interval():
  headline = summary.Headline("d", "a.share", ">=", 0.5)
  judged = summary.judge(
    {"a": {"share": 0.6, "low": None, "high": None, "groups": 1, "effective_groups": 1.0}}, headline
  )
  assert judged["interval"] is None
  assert judged["met"] is True


def test_figures_of_another_judge_are_the_first_headlines(tmp_path):
  figures = [
    {"title": "Colors shown", "value": 0.5, "target": 0.6},
    {"title": "Shapes shown", "value": 1, "target": 0.4},
  ]
  write_json(tmp_path / "judged.json", {"figures": figures})
  lines = summary.collect(tmp_path)["headlines"]
  assert [(line["title"], line["value"], line["met"]) for line in lines[:2]] == [
    ("Colors shown", 0.5, False),
    ("Shapes shown", 1, True),
  ]
  assert [line["title"] for line in lines[2:]] == [line.title for line in summary.HEADLINES]


def test_a_damaged_figure_of_another_judge_is_named(tmp_path):
  write_json(tmp_path / "judged.json", {"figures": [{"title": "Colors shown", "value": "half"}]})
  sentence = "judged.json, a figure: its field 'value' must be of type number, and is 'half'"
  with pytest.raises(UserError, match=re.escape(sentence)):
    summary.judged(epath.Path(tmp_path))
