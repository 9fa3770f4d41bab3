"""Tests that weights are read only from safetensors, have the expected names, and have a digest."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy

from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics import published_weights
from tests.refusals import refused

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
SHAPES = {"a.weight": (2, 3), "b": (3,)}


class Trap:
  """Object that fails the test when it is unpickled."""

  def __reduce__(self):
    return pytest.fail, ("the file was unpickled",)


def test_a_pickle_or_damaged_file_is_refused_without_reading_it(tmp_path):
  path = tmp_path / "x.safetensors"
  for content in (pickle.dumps(Trap()), safetensors.numpy.save(TENSORS)[:-1], b""):
    path.write_bytes(content)
    with refused(UserError, str(path)):
      published_weights.read_tensors(path)


@pytest.mark.parametrize(
  ("tensors", "name"),
  [
    ({"b": TENSORS["b"]}, "a.weight"),
    (TENSORS | {"a.weight": TENSORS["a.weight"].T}, "a.weight"),
    (TENSORS | {"b": np.ones(3, np.float16)}, "b"),
    (TENSORS | {"c": TENSORS["b"]}, "c"),
  ],
)
def test_the_first_wrong_tensor_is_named(tensors, name):
  published_weights.check_shapes("f", TENSORS, SHAPES, "N")
  with refused(UserError, "f", f"'{name}'"):
    published_weights.check_shapes("f", tensors, SHAPES, "N")


def test_a_digest_depends_on_the_tensors_alone(tmp_path):
  digest = published_weights.digest(TENSORS)
  content = b'["a.weight", "float32", [2, 3]]\n' + struct.pack("<6f", *range(6))
  content += b'["b", "float32", [3]]\n' + struct.pack("<3f", 1, 1, 1)
  assert digest == hashlib.sha256(content).hexdigest()
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(dict(reversed(TENSORS.items())), path, {"note": "x"})
  assert published_weights.digest(published_weights.read_tensors(path)) == digest
