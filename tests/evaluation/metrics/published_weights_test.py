"""Tests that weights are read only from safetensors, have the expected names, and have a digest."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import published_weights
from tests.refusals import refused

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
SHAPES = {"a.weight": (2, 3), "b": (3,)}


class Trap:
  """Object that fails the test when it is unpickled."""

  def __reduce__(self):
    return pytest.fail, ("the file was unpickled",)


def torch_file(path, **options):
  torch = pytest.importorskip("torch")
  torch.save({"a.weight": torch.ones(2)}, path, **options)


PICKLES = {
  "zip.pth": torch_file,
  "zip.safetensors": torch_file,
  "old.pt": lambda path: torch_file(path, _use_new_zipfile_serialization=False),
  "old.weights": lambda path: torch_file(path, _use_new_zipfile_serialization=False),
  "trap.safetensors": lambda path: path.write_bytes(pickle.dumps(Trap())),
  # The suffix suggests a pickle for torch.load.
  "named.pth": lambda path: safetensors.numpy.save_file(TENSORS, path),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_refused_without_reading_it(name, tmp_path):
  path = tmp_path / name
  PICKLES[name](path)
  with refused(UserError):
    published_weights.read_tensors(path)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_safetensors_file_that_begins_like_a_pickle_is_read(protocol, tmp_path):
  """A header length of 0x80 + 256 * protocol begins with the same two bytes as a pickle."""
  path, length = tmp_path / "x.safetensors", 0x80 + 256 * protocol
  header = len(safetensors.numpy.save(TENSORS, {"note": ""})) - 36
  safetensors.numpy.save_file(TENSORS, path, {"note": "x" * (length - header + 8)})
  assert path.read_bytes()[:2] == bytes([0x80, protocol])
  tensors = published_weights.read_tensors(path)
  assert {name: x.tolist() for name, x in tensors.items()} == {
    name: x.tolist() for name, x in TENSORS.items()
  }


def test_a_file_that_is_absent_or_damaged(tmp_path):
  for path in (tmp_path / "absent.safetensors", tmp_path):
    with refused(UserError):
      published_weights.read_tensors(path)
  damaged = tmp_path / "half.safetensors"
  damaged.write_bytes(safetensors.numpy.save(TENSORS)[:-1])
  with refused(UserError):
    published_weights.read_tensors(damaged)
  damaged.write_bytes(b"")
  with refused(UserError):
    published_weights.read_tensors(damaged)


@pytest.mark.parametrize(
  "tensors",
  [
    {"b": TENSORS["b"]},
    {},
    TENSORS | {"a.weight": TENSORS["a.weight"].T},
    TENSORS | {"b": np.ones(3, np.float16)},
    TENSORS | {"c": TENSORS["b"]},
  ],
)
def test_the_first_wrong_tensor_is_named(tensors):
  published_weights.check_shapes("f", TENSORS, SHAPES, "N")
  with refused(UserError):
    published_weights.check_shapes("f", tensors, SHAPES, "N")


def test_a_digest_depends_on_the_tensors_alone(tmp_path):
  digest = published_weights.digest(TENSORS)
  content = b'["a.weight", "float32", [2, 3]]\n' + struct.pack("<6f", *range(6))
  content += b'["b", "float32", [3]]\n' + struct.pack("<3f", 1, 1, 1)
  assert digest == hashlib.sha256(content).hexdigest()
  assert published_weights.digest(dict(reversed(TENSORS.items()))) == digest
  for i, metadata in enumerate([None, {"format": "pt", "note": "x"}]):
    path = tmp_path / f"{i}.safetensors"
    safetensors.numpy.save_file(dict(reversed(TENSORS.items())), path, metadata)
    assert published_weights.digest(published_weights.read_tensors(path)) == digest


@pytest.mark.parametrize(
  "change",
  [
    lambda t: {"a.bias": t["a.weight"], "b": t["b"]},
    lambda t: {"a.weight": t["b"], "b": t["a.weight"]},
    lambda t: t | {"a.weight": t["a.weight"].reshape(3, 2)},
    lambda t: t | {"b": t["b"].view(np.int32)},
    lambda t: t | {"b": np.nextafter(t["b"], np.float32(2))},
    lambda t: {"b": t["b"]},
  ],
)
def test_a_digest_notices_every_change(change):
  assert published_weights.digest(change(TENSORS)) != published_weights.digest(TENSORS)
