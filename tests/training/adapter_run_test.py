"""Runs that train adapters: kills, going back, another mesh, checked steps and grids of samples."""

import jax
import numpy as np
import pytest

from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.models import adapters
from cm3leon_jax.weights import reading
from tests.models.tiny import mesh_of, random_params
from tests.training.runs import MODEL, STEPS, Crash, assert_equal, crash_at, losses
from tests.training.runs import run as run_of

ADAPTER = AdapterConfig(rank=3)


def frozen_params():
  return random_params(MODEL)


def run(folder, loader, **fields):
  return run_of(
    folder, loader, tuned=ADAPTER, frozen_params=frozen_params, ema_decay=0.9, **fields
  )


def trained(folder, average=True):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    factors, _ = reading.load_params(folder, MODEL, average=average, tuned=ADAPTER)
    return jax.device_get(factors)


@pytest.fixture(scope="module")
def adapted(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("adapted")
  return folder, run(folder, loader)


def test_a_killed_run_continues_bit_for_bit(adapted, loader, tmp_path):
  """After a kill in step 11, the run repeats the steps since its checkpoint and continues."""
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(11, tmp_path), sample_every=1)
  assert run(tmp_path, loader, fresh=True) == adapted[1]
  assert losses(tmp_path) == losses(adapted[0])
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  (event,) = [line for line in lines if line.get("event") == "resumed"]
  assert event["replayed"] == event["identical"] == 11 - event["from_step"]
  for average in (True, False):
    assert_equal(trained(tmp_path, average), trained(adapted[0], average))
  assert losses(tmp_path)[STEPS] < losses(tmp_path)[1] - 0.3


def test_grids_of_samples_get_the_sum_of_the_base_and_the_averaged_adapters(loader, tmp_path):
  seen = {}

  def sample_grid(params, step):
    seen[step] = jax.device_get(params)

  run(tmp_path, loader, sample_grid=sample_grid, sample_every=4, steps=4)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    factors = jax.device_put(trained(tmp_path))
    expected = adapters.merge(frozen_params(), factors, ADAPTER)
  for a, b in zip(jax.tree.leaves(seen[4]), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1)])
def test_checked_steps_find_no_fault_and_change_nothing(loader, tmp_path, shape):
  usual, checked = tmp_path / "usual", tmp_path / "checked"
  run(usual, loader, shape=shape)
  run(checked, loader, shape=shape, replay_every=3)
  assert losses(checked) == losses(usual)
  assert_equal(trained(checked), trained(usual))


def test_a_checkpoint_has_no_array_of_the_base(adapted):
  newest = adapted[0] / "checkpoints" / str(STEPS) / "state"
  names = read_json(newest / "_METADATA")["tree_metadata"]
  assert any("'q'" in name and "'a'" in name for name in names)
  others = ("positions", "qkv", "'embed'")
  assert not any(other in name for name in names for other in others)
