import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.evidence import reward_gain
from benchmarks.evidence.reward_gain import Drawn
from cm3leon_jax.config.build import build
from cm3leon_jax.config.settings import settings_from_config
from examples.scenes import config as scenes
from examples.scenes import source
from examples.scenes.judge import baselines
from examples.scenes.options import ScenesConfig

START = Drawn(np.array([0.5, 0.5, 1.0, 1.0]), np.array([0.5, 0.5, 0.5, 0.5]), 0.2, 8.0)


def cells_of(line):
  return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_has_gains_per_prompt_and_the_share_of_failures_that_is_gone():
  after = Drawn(START.judged + [0.25, 0, 0, 0], START.counted + 0.25, 0.19, 7.2)
  name, judged, gain, gone, counted, again, gone_again, *spreads = cells_of(
    reward_gain.line("a", START, after)
  )
  assert (name, judged, counted) == ("a", "75.0% -> 81.2%", "50.0% -> 75.0%")
  assert (gone, gone_again, *spreads) == ("25%", "50%", "95.0%", "90.0%")
  assert gain.startswith("+6.2 [+0.0, +")
  assert again == "+25.0 [+25.0, +25.0]"
  assert len(cells_of(reward_gain.HEADER)) == 9


def test_the_mean_of_runs_is_that_of_each_prompt():
  other = Drawn(START.judged + [0.5, 0.5, 0, 0], START.counted, 0.1, 6.0)
  mean = reward_gain.mean([START, other])
  assert mean.judged == pytest.approx([0.75, 0.75, 1, 1])
  assert (mean.spread, mean.pixels) == (pytest.approx(0.15), 7.0)
  assert mean.counted == pytest.approx(START.counted)


def test_claims_of_training_are_those_of_its_captions_and_its_prompts():
  config = scenes.get_config("2")
  config.raw.options.train = 3
  few = build(ScenesConfig, config.raw.options, "raw.options")
  settings = settings_from_config(config)
  facts = [source.pair(few, "train", i).facts["include"] for i in range(4)]
  claims = reward_gain.claims_of_training(settings, None)
  assert claims == {baselines.claims_of(one) for one in facts[:3]}
  assert baselines.claims_of(facts[3]) not in claims


def test_the_spread_of_pixels_is_the_mean_difference_over_pairs():
  images = np.array([[[0, 0], [0, 200], [0, 200]]], np.uint8)
  assert reward_gain.pixel_spread(images) == pytest.approx((100 + 100 + 0) / 3)


def measured(folder, *flags):
  prompts = [str(folder), "--tasks=draw", "--records=50", "--heldout=40", "--seed=2"]
  subprocess.run([sys.executable, "-m", "examples.scenes.make_instructions", *prompts], check=True)
  command = [sys.executable, "-m", "benchmarks.evidence.reward_gain", "--start=scenes-instruct"]
  command += [*flags, f"--config.instructions.tasks={folder / 'tasks.yaml'}"]
  command += ["--config.reinforce.samples=4", "--config.reinforce.heldout_prompts=20"]
  return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_model_gains_nothing_over_itself_but_another_model_differs(tmp_path):
  result = measured(tmp_path, "--runs=scenes-instruct,scenes", "--skip=4", "--trained=scenes")
  result.check_returncode()
  first, *lines = result.stdout.splitlines()
  line, other, *of_new = [line for line in lines if line.startswith("| scenes")]
  assert len(of_new) == 2
  count = re.search(r"(\d+) of these prompts make claims that no training made", result.stdout)
  assert 0 < int(count[1]) < 16
  assert first == "16 prompts with 4 samples each"
  assert cells_of(other)[0] == "scenes"
  assert cells_of(other)[-1] != "100.0%"
  name, judged, gain, gone, counted, again, gone_again, *spreads = cells_of(line)
  assert (name, gone, gone_again) == ("scenes-instruct", "0%", "0%")
  assert spreads == ["100.0%"] * 2
  assert gain == again == "+0.0 [+0.0, +0.0]"
  before, after = (float(share.rstrip("%")) for share in judged.split(" -> "))
  assert 30 < before == after < 100
  assert abs(float(counted.split("%")[0]) - before) < 5
