import pytest

from tests.benchmarks.faults_kill_test import run_part

pytestmark = pytest.mark.slow


def test_damage_is_named_and_the_newest_whole_checkpoint_is_restored(tmp_path):
  found = run_part(tmp_path, "damage", 130)
  assert found["faults"] == 130
  assert found["control"]["wrong"] > 0
  assert sum(kind["wrong"] for kind in found["kinds"].values()) == 0


def test_the_command_goes_back_or_refuses(tmp_path):
  found = run_part(tmp_path, "command", 12)
  assert {kind["faults"] for kind in found["kinds"].values()} == {1}
  assert found["unchanged"]
