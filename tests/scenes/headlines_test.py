import pytest

from cm3leon_jax.reports import summary
from cm3leon_jax.scenes import headlines


@pytest.mark.parametrize("found", [{}, {"vqgan": {"psnr_db": 20.0}, "evaluation": {}}])
def test_a_run_of_another_source_has_no_headline_of_scenes(found):
  assert headlines.headlines(found) == ()


def test_headlines_of_a_tuned_run_are_found_in_its_grades():
  share = {"right": {"share": 0.9, "low": 0.8, "high": 0.95}}
  grades = {
    "tasks": {"exists": {"after": share}, "describe": {"after": share}},
    "means": {"questions": {"after": 0.81}, "edits": {"after": 0.4}, "edits, kept": {"after": 0.9}},
    "gains": {"draw": {"share": 0.0, "low": -0.05, "high": 0.05}},
  }
  found = [summary.compare({"grades": grades}, line) for line in headlines.TUNED_HEADLINES]
  assert [line["value"] for line in found] == [0.81, 0.9, 0.9, 0.4, 0.9, 0.0]
  assert [line["met"] for line in found] == [True, False, True, False, True, False]
  # 0.9 >= 0.85 and 0 >= -0.03 do not suffice: the whole interval must reach the limit.
  whole = "whole interval"
  assert [line["note"] for line in found] == ["", whole, whole, "", "", whole]


def test_one_guidance_weight_has_no_headline_of_a_gain():
  found = headlines.headlines({"evaluation": {"scenes": {"best": {}}}})
  left_out = set(headlines.SCENE_HEADLINES) - set(found)
  assert [line.path for line in left_out] == ["evaluation.scenes.gain.share"]
