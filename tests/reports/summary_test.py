import pytest

from cm3leon_jax.reports import summary


@pytest.mark.parametrize(
  ("found", "expected"),
  [
    ({}, False),
    ({"vqgan": {"psnr_db": 20.0}, "evaluation": {}}, False),
    ({"vqgan": {"reconstructed_scenes_right": 0.9}}, True),
    ({"evaluation": {"scenes": {"gain": {}}}}, True),
  ],
)
def test_headlines_are_chosen_by_what_was_judged(found, expected):
  chosen = summary.headlines(found)
  assert (chosen == list(summary.SCENE_HEADLINES)) is expected
  assert (chosen == list(summary.HEADLINES)) is not expected


def test_one_guidance_weight_has_no_headline_of_a_gain():
  left_out = set(summary.SCENE_HEADLINES) - set(
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
