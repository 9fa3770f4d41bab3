import pathlib
import subprocess
import sys

import pytest

from benchmarks import faults_stages
from cm3leon_jax.files.json_files import read_json

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


def run_part(workdir, part: str, count: int) -> dict:
  command = [sys.executable, "-m", "benchmarks.faults", f"--part={part}", f"--workdir={workdir}"]
  result = subprocess.run(
    [*command, f"--count={count}"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return read_json(workdir / "results.json")[part]


def test_a_run_that_was_killed_25_times_loses_nothing(tmp_path):
  found = run_part(tmp_path, "kill", 25)
  assert found["kills"] == 25
  assert found["runs_equal"] == found["runs"]
  assert found["control_differs"]
  assert found["replayed"] == found["replayed_equal"] > 0


def test_each_stage_that_was_killed_ends_as_one_that_was_not(tmp_path):
  found = run_part(tmp_path, "stages", 2)
  assert set(found["stages"]) == set(faults_stages.STAGES)
  assert found["control_differs"]
  for stage in found["stages"].values():
    assert stage["kills"] >= 2
    assert stage["equal"] == stage["runs"]
