import json
import os

import jax
from jax.sharding import PartitionSpec as P
import pytest

from cm3leon_jax.mesh import RULES, MeshConfig, create_mesh, gathered, shard, spec, unsplit
from tests.launched import python
from tests.refusals import refused


def test_the_remaining_devices_go_to_the_axis_of_minus_one():
  shape = {"data": 1, "fsdp": 64, "fsdp_inner": 1, "tensor": 4}
  assert MeshConfig(fsdp=-1, tensor=4).over(256) == shape
  assert MeshConfig(fsdp=64, tensor=4).over(256) == shape
  with refused(ValueError, "fsdp_inner", "1"):
    MeshConfig(fsdp=-1, tensor=4).over(10)
  with refused(ValueError, "fsdp_inner", "1"):
    MeshConfig(fsdp=8, tensor=4).over(10)


def test_spec_literals():
  assert spec("vocab_stored", None) == P(("tensor", "fsdp", "fsdp_inner"), None)
  assert spec("batch", "length", "vocab") == P(("data", "fsdp", "fsdp_inner"), None, "tensor")


def test_a_program_that_is_traced_unsplit_names_no_sharding():
  def function(x):
    return gathered(shard(2 * x, "batch", None))

  with jax.set_mesh(create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
    on_mesh = jax.jit(function).lower(jax.numpy.ones((2, 2))).as_text()
    with unsplit():
      assert spec("batch") is None
      assert jax.sharding.get_abstract_mesh().empty
      text = jax.jit(function).lower(jax.numpy.ones((2, 2))).as_text()
    assert spec("batch") == P(("data", "fsdp", "fsdp_inner"))
    assert jax.sharding.get_abstract_mesh().shape["data"] == 1
  assert "sdy" in on_mesh
  assert "sdy" not in text


def test_rest_of_the_devices():
  shape = dict(create_mesh(MeshConfig(2, -1, 2)).shape)
  assert shape == {"data": 2, "fsdp": 2, "fsdp_inner": 1, "tensor": 2}


def test_shapes_that_do_not_fit_are_refused():
  with refused(ValueError, "fsdp_inner", "3"):
    create_mesh(MeshConfig(3, -1, 1))
  with pytest.raises(ValueError, match="except that one may be -1"):
    MeshConfig(-1, -1, 1)


def test_every_rule_names_axes_of_the_mesh():
  axes = set(create_mesh(MeshConfig()).axis_names)
  for rule in RULES.values():
    assert {rule} <= axes | {None} if isinstance(rule, str | None) else set(rule) <= axes


SLICES = """
import json
from jax.experimental import topologies
from cm3leon_jax.mesh import MeshConfig, create_mesh

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2)
devices = topology.devices
for shape in ((2, 2, 2), (4, 1, 2), (-1, 2, 1)):
  mesh = create_mesh(MeshConfig(*shape), devices)
  slices = [[device.slice_index for device in part.flat] for part in mesh.devices]
  ids = {device.id for device in mesh.devices.flat}
  print(json.dumps([slices, len(ids), [str(t) for t in set(mesh.axis_types)]]))
try:
  create_mesh(MeshConfig(1, 4, 2), devices)
except ValueError as error:
  print(error)
print(create_mesh(MeshConfig(1, 2, 2), devices[:4]).size)
# An axis that is a part of a dimension of the torus, on one slice and on two.
for name, slices in (("v6e:4x4", {}), ("v5e:4x4", {"num_slices": 2})):
  devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices
  print(create_mesh(MeshConfig(-1, 1, 2), devices).shape["data"])
"""


@pytest.mark.tpu_backend
def test_slices_lie_along_data():
  """Two slices of 2 x 2 chips. Uses a new process, because libtpu breaks the profiler."""
  pytest.importorskip("libtpu")
  env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  result = python(SLICES, timeout=120, env=env)
  assert result.returncode == 0, result.stderr
  *found, refused, one_slice, v6e, two_slices = result.stdout.splitlines()
  four = [[0] * 2] * 2 + [[1] * 2] * 2
  for line, expected in zip(found, ([[0] * 4, [1] * 4], four, four), strict=True):
    assert json.loads(line) == [expected, 8, ["AxisType.Explicit"]]
  assert refused == "mesh.data is 1; the devices are in 2 slices, so it must be a multiple of 2."
  assert one_slice == "4"
  assert (v6e, two_slices) == ("8", "16")
