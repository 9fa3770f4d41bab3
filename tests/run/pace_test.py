from etils import epath
import pytest

from cm3leon_jax.run import pace
from cm3leon_jax.run.pace import Pace


def test_the_steps_and_all_else_fill_the_minutes():
  found = Pace.of(15.0, 300.0, 0.25)
  assert found.steps == (900 - 300 - pace.START_SECONDS) / 0.25 - pace.OTHER_STEPS
  assert found.seconds_before + found.seconds_left == 900
  slower = Pace.of(15.0, 300.0, 0.5)
  assert slower.steps < found.steps / 2
  assert slower.seconds_left == pytest.approx(600, abs=0.5)


def test_a_run_with_too_few_minutes_says_when_it_ends():
  found = Pace.of(2.0, 300.0, 0.25)
  assert found.steps == pace.LEAST
  assert "2 minutes are too few" in found.describe("14:05")
  assert "takes about 8 minutes; it ends at about 14:05" in found.describe("14:05")


def test_the_decision_of_a_run_is_kept(tmp_path):
  folder = epath.Path(tmp_path)
  assert pace.read(folder) is None
  pace.write(folder, Pace.of(15.0, 300.0, 0.25))
  assert pace.read(folder) == Pace.of(15.0, 300.0, 0.25)
