import os

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.models import nnx_params
from cm3leon_jax.tokenizers.published_source import find_files
from cm3leon_jax.weights.stored_tensors import files_of_index, load, save
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
  return nnx_params.to_dict(nnx.state(make()))


def test_a_filled_module_computes_what_its_parameters_say_under_jit_too():
  skeleton, x = nnx_params.structure(make), jnp.ones((1, 3))
  params = params_of()

  def compute(params):
    return nnx_params.fill(*skeleton, params)(x)

  np.testing.assert_allclose(compute(params), make()(x), rtol=1e-6)
  doubled = jax.tree.map(lambda x: 2 * x, params)
  # Doubles the layers and the factor, so the output is 4 times as large.
  np.testing.assert_allclose(jax.jit(compute)(doubled), 4 * make()(x), rtol=1e-6)
  np.testing.assert_allclose(compute(params), make()(x), rtol=1e-6)  # The skeleton is unchanged.


def test_a_file_holds_the_parameters_and_is_read_in_the_dtypes_asked_for(tmp_path):
  path, params = tmp_path / "a.safetensors", params_of()
  save(path, params)
  jax.tree.map(np.testing.assert_array_equal, load(path, params, "train_clip"), params)
  short = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
  found = load(path, short, "train_clip")
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


# What breaks a file of parameters, and what the error names beside the file.
BROKEN = [
  (lambda path, params: None, "train_clip"),
  (lambda path, params: save(path, params | {"factor": jnp.ones(2)}), "factor"),
  (lambda path, params: save(path, {"layers": params["layers"]}), "factor"),
  (lambda path, params: save(path, params | {"factor": jnp.float32("nan")}), "factor"),
  (lambda path, params: path.write_bytes(b"no safetensors"), "damaged"),
  (lambda path, params: (path.touch(), os.truncate(path, 2**40)), "1,099,511,627,776 bytes"),
]


@pytest.mark.parametrize(("break_file", "fact"), BROKEN)
def test_a_broken_file_of_parameters_is_named(tmp_path, break_file, fact):
  path, params = tmp_path / "a.safetensors", params_of()
  break_file(path, params)
  with refused(UserError, str(path), fact):
    load(path, params, "train_clip")


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "..", "", 3, None, ["x"]])
def test_an_index_names_files_of_its_folder_only(place, tmp_path):
  path = tmp_path / "model.safetensors.index.json"
  write_json(path, {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
  assert files_of_index(path) == {"a": "x.safetensors", "b": "y.safetensors"}
  write_json(path, {"weight_map": {"a": place}})
  # The reader of published tokenizers rejects the index, too.
  for read in (lambda: files_of_index(path), lambda: find_files(tmp_path)):
    with refused(UserError, str(path)):
      read()
