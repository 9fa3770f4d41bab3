"""Tests that Ray workers process every shard, even after a worker is killed."""

import json

import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.stages.shards import Runner
from tests.refusals import refused
from tests.stages.shards_test import NAMES, Copy, log, run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray prints warnings.


@pytest.fixture(scope="module")
def ray_address():
  ray = pytest.importorskip("ray")
  ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
  yield "auto"
  ray.shutdown()


def test_ray_does_every_shard_although_a_worker_is_killed(tmp_path, ray_address):
  job = Copy(str(tmp_path), kill_once="05")
  results = run(tmp_path, job, runner=Runner("ray", ray_address, workers=2))
  assert results == {name: {"length": 2} for name in NAMES}
  assert {path.stem: path.read_text() for path in tmp_path.glob("*.out")} == {
    name: name for name in NAMES
  }
  assert (tmp_path / "killed").exists()
  assert log(tmp_path).count("05") == 2  # Written twice, because its worker was killed.
  assert len(set((tmp_path / "opened").read_text().split())) >= 2
  assert sorted(
    json.loads(p.read_text())["config"]["digest"] for p in (tmp_path / "done").glob("*.json")
  ) == list(range(12))
  before = log(tmp_path)
  run(tmp_path, job)  # All shards are finished.
  assert log(tmp_path) == before


def test_a_user_error_in_a_ray_worker_is_raised_in_one_sentence(tmp_path, ray_address):
  with refused(UserError, "05"):
    run(tmp_path, Copy(str(tmp_path), wrong="05"), runner=Runner("ray", ray_address))
