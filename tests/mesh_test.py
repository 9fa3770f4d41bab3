import jax
from jax.sharding import PartitionSpec as P
import pytest

from cm3leon_jax.mesh import RULES, MeshConfig, create_mesh, spec


def test_spec_literals():
  assert spec("vocab_stored", None) == P(("tensor", "fsdp", "fsdp_inner"), None)
  assert spec("batch", "length", "vocab") == P(("data", "fsdp", "fsdp_inner"), None, "tensor")


def test_rest_of_the_devices():
  assert dict(create_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "fsdp_inner": 1, "tensor": 2}


def test_shapes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="does not use 8 devices exactly"):
    create_mesh(MeshConfig(3, -1, 1))
  with pytest.raises(ValueError, match="at most one -1"):
    MeshConfig(-1, -1, 1)


def test_every_rule_names_axes_of_the_mesh():
  axes = set(create_mesh(MeshConfig()).axis_names)
  for rule in RULES.values():
    assert {rule} <= axes | {None} if isinstance(rule, str | None) else set(rule) <= axes


def test_all_devices_of_the_tests_are_there():
  assert len(jax.devices()) == 8
