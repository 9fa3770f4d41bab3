"""Runs that train adapters or groups of parameters: kills, checked steps and grids of samples."""

import jax
import numpy as np
import pytest

from cm3leon_jax.config.groups import Groups
from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.models import adapters, groups
from cm3leon_jax.weights import reading
from tests.data.stores import VOCAB
from tests.models.tiny import mesh_of, random_params
from tests.training.runs import MODEL, STEPS, Crash, assert_equal, crash_at, losses
from tests.training.runs import run as run_of

ADAPTER = AdapterConfig(rank=3)
GROUPS = Groups(("embed.image", "layers.1-1"), VOCAB.text_size)


def frozen_params():
  return random_params(MODEL)


def initial_params():
  return jax.jit(groups.split, static_argnums=(1, 2))(frozen_params(), GROUPS, MODEL)


def run(folder, loader, tuned=ADAPTER, **fields):
  first = initial_params if tuned == GROUPS else None
  return run_of(
    folder, loader, tuned=tuned, frozen_params=frozen_params, initial_params=first, ema_decay=0.9,
    **fields,
  )  # fmt: skip


def trained(folder, average=True, tuned=ADAPTER):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    factors, _ = reading.load_params(folder, MODEL, average=average, tuned=tuned)
    return jax.device_get(factors)


@pytest.fixture(scope="module")
def adapted(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("adapted")
  return folder, run(folder, loader)


@pytest.fixture(scope="module")
def grouped(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("grouped")
  return folder, run(folder, loader, GROUPS)


@pytest.mark.parametrize(("name", "tuned"), [("adapted", ADAPTER), ("grouped", GROUPS)])
def test_a_killed_run_continues_bit_for_bit(name, tuned, request, loader, tmp_path):
  """After a kill in step 11, the run repeats the steps since its checkpoint and continues."""
  whole, result = request.getfixturevalue(name)
  with pytest.raises(Crash):
    run(tmp_path, loader, tuned, sample_grid=crash_at(11, tmp_path), sample_every=1)
  assert run(tmp_path, loader, tuned, fresh=True) == result
  assert losses(tmp_path) == losses(whole)
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  (event,) = [line for line in lines if line.get("event") == "resumed"]
  assert event["replayed"] == event["identical"] == 11 - event["from_step"]
  for average in (True, False):
    assert_equal(trained(tmp_path, average, tuned), trained(whole, average, tuned))
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
@pytest.mark.parametrize(
  ("shape", "tuned"), [((1, 1, 1), ADAPTER), ((2, 2, 1), ADAPTER), ((2, 2, 1), GROUPS)]
)
def test_checked_steps_find_no_fault_and_change_nothing(loader, tmp_path, shape, tuned):
  usual, checked = tmp_path / "usual", tmp_path / "checked"
  run(usual, loader, tuned, shape=shape)
  run(checked, loader, tuned, shape=shape, replay_every=3)
  assert losses(checked) == losses(usual)
  assert_equal(trained(checked, tuned=tuned), trained(usual, tuned=tuned))


def test_a_checkpoint_has_no_array_of_the_base(adapted):
  newest = adapted[0] / "checkpoints" / str(STEPS) / "state"
  names = read_json(newest / "_METADATA")["tree_metadata"]
  assert any("'q'" in name and "'a'" in name for name in names)
  others = ("positions", "qkv", "'embed'")
  assert not any(other in name for name in names for other in others)
