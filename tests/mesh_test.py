import jax
from jax.experimental import topologies
from jax.sharding import AxisType
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


@pytest.fixture
def two_slices(monkeypatch):
  """Descriptions of two TPU slices of 2 x 2 chips, of which there are none here."""
  pytest.importorskip("libtpu")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices


@pytest.mark.tpu_backend
@pytest.mark.parametrize("config", [MeshConfig(2, 2, 2), MeshConfig(4, 1, 2), MeshConfig(-1, 2, 1)])
def test_slices_lie_along_data(two_slices, config):
  mesh = create_mesh(config, two_slices)
  half = mesh.shape["data"] // 2
  for i, part in enumerate((mesh.devices[:half], mesh.devices[half:])):
    assert {device.slice_index for device in part.flat} == {i}
  assert mesh.size == len({device.id for device in mesh.devices.flat}) == 8
  assert set(mesh.axis_types) == {AxisType.Explicit}


@pytest.mark.tpu_backend
def test_data_must_split_over_the_slices(two_slices):
  with pytest.raises(ValueError, match=r"mesh\.data is 1; the devices lie in 2 slices, and it must be a multiple"):
    create_mesh(MeshConfig(1, 4, 2), two_slices)
  assert create_mesh(MeshConfig(1, 4, 1), two_slices[:4]).size == 4
