import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from cm3leon_jax.errors import UserError
from cm3leon_jax.export import huggingface
from cm3leon_jax.weights import placed, tensor_files
from cm3leon_jax.weights.stored_tensors import StoredTensors, are_in, digest_of
from cm3leon_jax.weights.tensor_files import Tensor
from tests.export.huggingface_test import VOCAB, config
from tests.files.buckets_test import run, server  # noqa: F401
from tests.models.tiny import mesh_of, random_params
from tests.refusals import refused

X = np.arange(24, dtype=np.float32).reshape(6, 4) / 3


def write(folder, dtype="float32", shard_bytes=10_000):
  folder.mkdir(exist_ok=True)
  tensors = [Tensor(name, X.shape, dtype, lambda: X) for name in ("a", "b", "c")]
  return tensor_files.write(folder, tensors, shard_bytes)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10_000, 10])
def test_parts_of_tensors_are_read(dtype, shard_bytes, tmp_path):
  assert len(write(tmp_path, dtype, shard_bytes)) == (1 if shard_bytes > 10 else 4)
  tensors, expected = StoredTensors(tmp_path), X.astype(tensor_files.DTYPES[dtype][1])
  assert are_in(tmp_path)
  assert sorted(tensors.names) == ["a", "b", "c"]
  assert (tensors.count, tensors.shape("b"), "d" in tensors) == (72, (6, 4), False)
  for index in ((), (slice(2, 5),), (slice(None), slice(1, 3)), (slice(4, None), slice(0, 1))):
    found = tensors.read("b", *index)
    np.testing.assert_array_equal(found, expected[index].astype(found.dtype))
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
  with refused(UserError, "'d'"):
    tensors.read("d")


def test_the_digest_is_that_of_every_file(tmp_path):
  assert digest_of(tmp_path) is None
  found = set()
  for name, size in (("one", 10_000), ("several", 100)):
    write(tmp_path / name, shard_bytes=size)
    found.add(digest_of(tmp_path / name))
  last = sorted((tmp_path / "several").glob("model-*"))[-1]
  last.write_bytes(last.read_bytes()[:-1] + b"\1")
  found.add(digest_of(tmp_path / "several"))
  last.unlink()
  found.add(digest_of(tmp_path / "several"))
  assert len(found) == 4


def test_a_process_reads_only_what_its_devices_hold(tmp_path, monkeypatch):
  model = config("modern", head_size=20)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params = random_params(model)
    huggingface.export(tmp_path, params, model, VOCAB, None)
    expected = jax.device_get(params)
  read, parts = StoredTensors.read, []

  def counted(self, name, *index, **options):
    x = read(self, name, *index, **options)
    parts.append((name, x.size))
    return x

  monkeypatch.setattr(StoredTensors, "read", counted)
  with jax.set_mesh(mesh_of(1, 4, 2)):
    found = placed.load(StoredTensors(tmp_path), model)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  of_a_device = {size for name, size in parts if name == "model.layers.1.self_attn.q_proj.weight"}
  assert of_a_device == {48 * 80 // 8}


def test_weights_of_another_config_and_of_no_numbers_are_refused(tmp_path):
  model = config("opt")
  with jax.set_mesh(mesh_of(1, 1, 1)):
    huggingface.export(tmp_path, random_params(model), model, VOCAB, None)
    with refused(UserError, str(tmp_path)):
      placed.load(StoredTensors(tmp_path), config("opt", mlp_width=32))
    path = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(path)
    tensors["model.decoder.layers.2.fc2.weight"][3, 5] = np.inf
    safetensors.save_file(tensors, path)
    with refused(UserError, "layers.2.fc2.weight"):
      placed.load(StoredTensors(tmp_path), model)
