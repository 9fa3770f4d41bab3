import dataclasses

from etils import epath
import pytest

from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.run import pace
from cm3leon_jax.run.pace import Pace
from examples.scenes import config


def test_the_steps_and_all_else_fill_the_minutes():
  found = Pace.of(15.0, 300.0, 0.25, 380)
  assert (found.steps, found.seconds_left) == (1_660, 600)
  assert Pace.of(15.0, 300.0, 0.5, 380).steps == 640


def test_the_demo_judges_images_after_its_training_and_own_images_are_only_sampled():
  demo = settings_from_config(config.get_config("15"))
  assert pace.after(demo) == 54 + 326  # 64 + 240 x 2 images of 144 codes, 1,920 tokens a step.
  own = dataclasses.replace(demo, evaluation=dataclasses.replace(demo.evaluation, judge=""))
  assert pace.after(own) == 54 + 38


@pytest.mark.parametrize("minutes", [5, 15, 17.3, 1_000])
@pytest.mark.parametrize("step", [0.004, 0.25, 1.7])
def test_a_run_ends_in_time_unless_it_needs_more_for_the_least_steps(minutes, step):
  found = Pace.of(minutes, 100.0, step, 380)
  left = 60 * minutes - found.seconds_before - found.seconds_left
  assert (left >= -1e-9) == ("too few" not in found.describe("14:05"))
  assert left >= 0 or found.steps == pace.LEAST
  assert left < step or found.steps == pace.MOST


def test_a_run_with_too_few_minutes_says_when_it_ends():
  found = Pace.of(2.0, 300.0, 0.25, 380)
  assert found.steps == 100
  assert "2 minutes are too few" in found.describe("14:05")
  assert "takes about 8 minutes; it ends at about 14:05" in found.describe("14:05")
  exact = Pace.of((300 + 90 + 480 * 0.004) / 60, 300.0, 0.004, 380)
  assert exact.steps == 100
  assert "takes 0.004 s" in exact.describe("14:05")
  assert "100 steps fit" in exact.describe("14:05")


def test_the_decision_of_a_run_is_kept(tmp_path):
  folder = epath.Path(tmp_path)
  assert pace.read(folder) is None
  pace.write(folder, Pace.of(15.0, 300.0, 0.25, 380))
  assert pace.read(folder) == Pace.of(15.0, 300.0, 0.25, 380)
