import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.weights import checkpoint, reading, stored
from tests.models.tiny import CONFIG, mesh_of, random_params, tree_of
from tests.refusals import refused


def save(folder, params, ema=None, split_layers=True):
  state = {"step": np.int32(3), "params": params, "opt_state": {"mu": params}}
  state |= {"ema": ema} if ema else {}
  with pytest.MonkeyPatch.context() as patch, checkpoint.Checkpoints(folder, keep=2) as opened:
    if not split_layers:
      patch.setattr(stored, "save_args", lambda state: None)
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


def test_a_checkpoint_of_an_earlier_version_is_read_too(tmp_path):
  """In earlier versions, a chunk covers all layers, or half of them if two replicas write."""
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params = random_params(dataclasses.replace(CONFIG, num_layers=3))
    save(tmp_path, params, split_layers=False)
  state = tmp_path / "checkpoints" / "3" / "state"
  text = (state / "array_metadatas" / "process_0").read_text()
  shapes = [e["array_metadata"]["chunk_shape"] for e in json.loads(text)["array_metadatas"]]
  assert 3 in {shape[0] for shape in shapes if shape}
  found = reading.open_params(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, tree_of(found), jax.device_get(params))
  for average in (True, False):
    with refused(UserError, str(tmp_path)):
      reading.open_params(tmp_path, average=average)
