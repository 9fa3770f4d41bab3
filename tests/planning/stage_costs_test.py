"""Tests estimated costs of stages against those in docs/pods.md."""

import pytest

from cm3leon_jax.planning import hardware, plan, stage_costs
from tests.planning.plan_test import settings

PAIRS = 1_400_000_000


@pytest.fixture(scope="module")
def of_7b():
  """Returns the settings of docs/pods.md's example, and the plan for its chips."""
  config = settings("cm3leon_7b", retrieval={"index_rows": 100_000_000}, data={"text_share": 0.0})
  return config, plan.make(config, hardware.load("v5e-256"), 0.4, 0.25)


@pytest.fixture(scope="module")
def small(of_7b):
  """Returns settings with a small image tokenizer and a small CLIP, and the plan of `of_7b`."""
  tokenizer = {"encoder_blocks": (0,) * 4, "decoder_blocks": (0,) * 4}
  clip = {"image_layers": 1, "text_layers": 1}
  return settings("cm3leon_7b", vqgan=tokenizer, clip=clip, data={"text_share": 0.0}), of_7b[1]


@pytest.fixture(scope="module")
def page(of_7b):
  return {cost.stage: cost for cost in stage_costs.estimate(*of_7b, PAIRS)}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("stage", "core_hours", "chip_hours"),
  [
    ("prepare_data", 3_600, 0),
    ("train_text_tokenizer", 91 / 3600, 0),
    ("encode_documents", 1_100, 190),
    ("build_neighbors", 1_100 + 78 + 67_000 + 56, 115),
  ],
)
def test_offline_stages_cost_what_the_page_says(page, stage, core_hours, chip_hours):
  assert page[stage].core_hours == pytest.approx(core_hours, rel=0.03)
  assert page[stage].chip_hours == pytest.approx(chip_hours, rel=0.03)


def test_training_costs_what_the_plan_says_and_the_small_trainings_their_steps(small):
  config, made = small
  costs = {cost.stage: cost for cost in stage_costs.estimate(config, made, PAIRS)}
  assert list(costs) == [
    "prepare_data", "train_text_tokenizer", "train_vqgan", "encode_documents", "train_clip",
    "build_neighbors", "train",
  ]  # fmt: skip
  assert costs["train"].chip_hours == made.chip_hours
  image, text = stage_costs.clip_flops(config)
  flops = 3 * (image + text) * config.clip.steps * config.clip.batch_size
  assert costs["train_clip"].chip_hours == pytest.approx(flops / (197e12 * 0.4) / 3600)


def test_pairs_are_those_of_a_pass_unless_they_are_given(small):
  config, made = small
  pairs = stage_costs.pairs_of_a_pass(config)
  assert pairs * 3 * (256 + 24 + 2) == pytest.approx(made.tokens)  # Each pair has two neighbors.
  costs = [stage_costs.Cost("a", 10.4, 0.0, "x"), stage_costs.Cost("b", 1.2, 2_000.0, "y")]
  lines = stage_costs.table(costs, made, 1_000, 2_500).splitlines()
  assert lines[:3] == [
    "stages, estimates for 1,000 pairs (--pairs; the run reads each 2.5 times, for one pass it "
    "needs 2,500)",
    f"  {'a':<22}10 core-hours: x",
    f"  {'b':<22}1.2 core-hours and 2,000 chip-hours: y",
  ]
  assert lines[3].startswith(f"  {'together':<22}12 core-hours and 2,000 chip-hours: rates of a ")
  assert "near duplicates are not removed" in lines[3]
  assert "(one pass of the run's tokens; --pairs=N" in stage_costs.table(costs, made, 5, 5)


def test_a_tuning_costs_its_training_alone():
  config = settings("sft_7b")
  made = plan.make(config, hardware.load("v5p-256"), 0.4, 0.25)
  [cost] = stage_costs.estimate(config, made, 1)
  assert (cost.stage, cost.chip_hours) == ("train", made.chip_hours)
