import json
import weakref

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from safetensors import safe_open

from cm3leon_jax.errors import UserError
from cm3leon_jax.weights import tensor_files
from cm3leon_jax.weights.tensor_files import Tensor
from tests.refusals import refused


def tensors_of(arrays, dtype="float32"):
  return [Tensor(name, x.shape, dtype, lambda x=x: x) for name, x in arrays.items()]


def some():
  rng = np.random.default_rng(0)
  return {f"t{i}": rng.normal(size=(i + 1, 5)).astype(np.float32) for i in range(6)}


@pytest.mark.parametrize("dtype", tensor_files.DTYPES)
def test_the_library_reads_what_was_written(tmp_path, dtype):
  arrays = {name: x.T * 50 for name, x in some().items()}  # Transposed arrays are not contiguous.
  files = tensor_files.write(tmp_path, tensors_of(arrays, dtype))
  assert files == ["model.safetensors"]
  kind = tensor_files.DTYPES[dtype][1]
  found = safetensors_numpy.load_file(tmp_path / files[0])
  assert found.keys() == arrays.keys()
  for name, x in arrays.items():
    assert found[name].dtype == kind
    np.testing.assert_array_equal(found[name], x.astype(kind))
  with safe_open(tmp_path / files[0], "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_the_file_is_byte_for_byte_that_of_the_library(tmp_path):
  """The order is that of the library safetensors: wider dtypes first, then by name."""
  arrays = some()
  tensor_files.write(tmp_path, tensors_of(arrays))
  expected = safetensors_numpy.save(arrays, {"format": "pt"})
  assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_shards_hold_at_most_so_many_bytes_and_the_index_names_them(tmp_path):
  arrays = some()  # 6 arrays of 20, 40, ..., 120 bytes.
  files = tensor_files.write(tmp_path, tensors_of(arrays), shard_bytes=190)
  index = json.loads((tmp_path / tensor_files.INDEX).read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
  names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  assert files == [*names, tensor_files.INDEX]
  expected = dict(zip(arrays, [names[0]] * 3 + [names[1]] * 2 + [names[2]]))
  assert index["weight_map"] == expected
  for name, file in expected.items():
    np.testing.assert_array_equal(safetensors_numpy.load_file(tmp_path / file)[name], arrays[name])


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
  alive = []

  def make(value):
    assert not any(reference() is not None for reference in alive[:-1])
    array = np.full((100, 100), value, np.float32)
    alive.append(weakref.ref(array))
    return array

  tensors = [Tensor(f"t{i}", (100, 100), "float32", lambda i=i: make(i)) for i in range(5)]
  tensor_files.write(tmp_path, tensors)
  assert len(alive) == 5


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (7e4, "float16")])
def test_what_is_not_finite_in_the_file_is_refused_by_name(tmp_path, value, dtype):
  with refused(UserError, "t1"):
    tensor_files.write(tmp_path, tensors_of({"t0": np.ones(2), "t1": np.array([1, value])}, dtype))
  tensor_files.write(tmp_path, tensors_of({"t1": np.array([1, 7e4])}, "float32"))
