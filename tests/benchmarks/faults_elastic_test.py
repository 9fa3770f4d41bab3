import pytest

from tests.benchmarks.faults_kill_test import run_part

pytestmark = pytest.mark.slow


def test_rows_and_losses_are_those_of_one_process(tmp_path):
  found = run_part(tmp_path, "elastic", 2)
  assert (found["lost"], found["surplus"], found["different"]) == (0, 0, 0)
  assert found["control"]["different"] > 0
  assert found["largest_difference"] < 1e-5 < found["train_control"]
