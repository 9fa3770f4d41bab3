import os

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax import parameters
from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.tokenizers.published_source import find_files
from tests.refusals import refused


class Sum(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(3, 2, rngs=rngs) for _ in range(2)])
    self.factor = nnx.Param(jnp.float32(2))

  def __call__(self, x):
    return self.factor * sum(layer(x) for layer in self.layers)


def make():
  return Sum(nnx.Rngs(0))


def params_of():
  return parameters.to_dict(nnx.state(make()))


def test_a_filled_module_computes_what_its_parameters_say_under_jit_too():
  skeleton, x = parameters.structure(make), jnp.ones((1, 3))
  params = params_of()

  def compute(params):
    return parameters.fill(*skeleton, params)(x)

  np.testing.assert_allclose(compute(params), make()(x), rtol=1e-6)
  doubled = jax.tree.map(lambda x: 2 * x, params)
  # The output is the sum of layers times a factor. Both are doubled, so the output is 4 times as
  # large.
  np.testing.assert_allclose(jax.jit(compute)(doubled), 4 * make()(x), rtol=1e-6)
  np.testing.assert_allclose(compute(params), make()(x), rtol=1e-6)  # The skeleton is unchanged.


def test_a_file_holds_the_parameters_and_is_read_in_the_dtypes_asked_for(tmp_path):
  path, params = tmp_path / "a.safetensors", params_of()
  parameters.save(path, params)
  jax.tree.map(np.testing.assert_array_equal, parameters.load(path, params, "train_clip"), params)
  short = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
  found = parameters.load(path, short, "train_clip")
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
  "change",
  [
    lambda p: p | {"factor": jnp.ones(2)},
    lambda p: {"layers": p["layers"]},
    lambda p: p | {"factor": jnp.float32("nan")},
    lambda p: p | {"factor": jnp.float32("inf")},
  ],
)
def test_a_file_of_another_model_is_refused(tmp_path, change):
  path = tmp_path / "clip" / "a.safetensors"
  path.parent.mkdir()
  parameters.save(path, change(params_of()))
  with refused(UserError):
    parameters.load(path, params_of(), "train_clip")


def test_a_file_larger_than_the_parameters_is_not_read(tmp_path):
  path = tmp_path / "a.safetensors"
  path.touch()
  os.truncate(path, 2**40)
  with pytest.raises(UserError, match=r"safetensors has 1,099,511,627,776 bytes; the maximum is"):
    parameters.load(path, params_of(), "train_clip")


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "..", "", 3, None, ["x"]])
def test_an_index_names_files_of_its_folder_only(place, tmp_path):
  path = tmp_path / "model.safetensors.index.json"
  write_json(path, {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
  expected = {"a": "x.safetensors", "b": "y.safetensors"}
  assert parameters.files_of_index(path) == expected
  write_json(path, {"weight_map": {"a": place}})
  with refused(UserError):
    parameters.files_of_index(path)
  with refused(UserError):
    find_files(tmp_path)  # The reader of published tokenizers rejects the index, too.
