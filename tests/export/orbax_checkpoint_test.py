import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.export import formats
from cm3leon_jax.run import exported as exported_lib
from cm3leon_jax.run import initial
from cm3leon_jax.run.run import Run, load_initial
from cm3leon_jax.tokenizers import text
from cm3leon_jax.weights import stored
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import mesh_of, random_params
from tests.refusals import refused


@pytest.fixture(params=["opt", "modern"])
def exported(request, run, tmp_path):
  model = dataclasses.replace(SETTINGS.model, family=request.param, num_layers=3)
  settings = dataclasses.replace(SETTINGS, model=model)
  with one_device():
    params = jax.device_get(random_params(model))
  choice = formats.Choice(format="orbax")
  of_run = formats.TrainedRun(Run(run, settings), stored.of_tree(params), choice)
  numbers = formats.write(tmp_path / "out", of_run)
  assert numbers["parameters"] == sum(x.size for x in jax.tree.leaves(params))
  return settings, params, tmp_path / "out", of_run


def test_orbax_alone_restores_it(exported):
  _, params, folder, _ = exported
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(str(folder / "params"))
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_nothing_is_compressed(exported):
  """Compression would need more memory in each of its threads."""
  _, params, folder, run = exported
  constant = stored.of_tree(jax.tree.map(np.ones_like, params))
  numbers = formats.write(folder.parent / "constant", dataclasses.replace(run, params=constant))
  files = (folder.parent / "constant" / "params" / "d").iterdir()
  assert sum(path.stat().st_size for path in files) > numbers["bytes"]


def test_a_run_starts_from_it_on_any_mesh(exported, run):
  settings, params, folder, _ = exported
  start = initial.find(settings, str(folder))
  assert start.step is None
  for name in text.FILES:
    assert (folder / name).read_text() == (run / "text_tokenizer" / name).read_text()
  with jax.set_mesh(mesh_of(2, 2, 2)):
    found, split = load_initial(start, settings), random_params(settings.model)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), params)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(split)):
    assert (x.sharding, x.dtype) == (y.sharding, y.dtype)
  other = dataclasses.replace(settings.model, mlp_width=64)
  with refused(UserError, str(folder)):
    initial.find(dataclasses.replace(settings, model=other), str(folder))


@pytest.mark.parametrize("exported", ["opt"], indirect=True)
def test_another_dtype_is_rounded_and_damage_is_found(exported):
  settings, params, folder, run = exported
  narrow = dataclasses.replace(run.choice, dtype="bfloat16")
  rounded = folder.parent / "rounded"
  formats.write(rounded, dataclasses.replace(run, choice=narrow))
  with one_device():
    found = load_initial(initial.find(settings, str(rounded)), settings)
    kept, wide = (
      exported_lib.load_params(x, settings.model, "bfloat16") for x in (rounded, folder)
    )
  assert {x.dtype.name for x in jax.tree.leaves(kept)} == {"bfloat16"}
  jax.tree.map(np.testing.assert_array_equal, (kept, wide), (found, params))
  expected = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
  data = max((folder / "params" / "d").iterdir(), key=lambda path: path.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(bytes(content))
  with one_device(), refused(UserError, data.name) as error:
    load_initial(initial.find(settings, str(folder)), settings)
  assert data.name in str(error.value)
