import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.weights import checkpoint, reading
from tests.models.tiny import CONFIG, mesh_of, random_params, tree_of
from tests.refusals import refused


def save(folder, params, ema=None):
  state = {"step": np.int32(3), "params": params, "opt_state": {"mu": params}}
  state |= {"ema": ema} if ema else {}
  with checkpoint.Checkpoints(folder, keep=2) as opened:
    opened.save(state, 3, next_row=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Saves parameters and their average from 8 devices; returns the folder and both trees."""
  folder = tmp_path_factory.mktemp("train")
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params, ema = random_params(CONFIG, seed=1), random_params(CONFIG, seed=2)
    save(folder, params, ema)
  return types.SimpleNamespace(
    folder=folder, params=jax.device_get(params), ema=jax.device_get(ema)
  )


def test_all_parameters_are_read_as_they_were(saved):
  for average, expected in ((None, saved.ema), (True, saved.ema), (False, saved.params)):
    found = reading.open_params(saved.folder, average=average)
    assert (found.step, found.averaged) == (3, average is not False)
    assert found.count == sum(x.size for x in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, tree_of(found), expected)


def test_each_layer_has_chunks_of_its_own(saved):
  state = saved.folder / "checkpoints" / "3" / "state"
  about = json.loads((state / "array_metadatas" / "process_0").read_text())["array_metadatas"]
  entries = [entry["array_metadata"] for entry in about]
  chunks = {entry["param_name"]: entry["chunk_shape"] for entry in entries}
  stacked = [shape for name, shape in chunks.items() if ".blocks." in name]
  assert len(stacked) >= 12
  assert {shape[0] for shape in stacked} == {1}
  assert chunks["params.embed"][0] > 1


def test_a_run_without_an_average_has_only_its_last_parameters(tmp_path):
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params = random_params(dataclasses.replace(CONFIG, num_layers=3))
    save(tmp_path, params)
  found = reading.open_params(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, tree_of(found), jax.device_get(params))
  for average in (True, False):
    with refused(UserError, str(tmp_path)):
      reading.open_params(tmp_path, average=average)
