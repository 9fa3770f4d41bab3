import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.planning import hardware, topology
from tests.refusals import refused


@pytest.mark.parametrize(
  ("name", "slices"),
  [
    *((name, 1) for name in ("v5e-200", "v5e256", "tpu", "h100-12", "h100-0", "v4-8")),
    ("h100-64", 2),
  ],
)
def test_unknown_hardware_is_refused(name, slices):
  with refused(UserError, "--slices" if slices > 1 else f"--topology is '{name}'"):
    hardware.load(name, slices)


@pytest.mark.parametrize(
  ("name", "slices", "chips", "hosts", "per_host", "accelerator"),
  [
    ("v5e-256", 1, 256, 64, 4, "v5litepod-256"),
    ("v5e-8", 1, 8, 1, 8, "v5litepod-8"),
    ("v5litepod-256", 1, 256, 64, 4, "v5litepod-256"),
    ("v5litepod:4x4", 1, 16, 4, 4, "v5litepod-16"),
    ("v5p-8", 1, 4, 1, 4, "v5p-8"),  # For v5p, the number is that of cores; a chip has two.
    ("v5p:2x2x2", 2, 16, 4, 4, "v5p-16"),
    ("v6e-256", 2, 512, 128, 4, "v6e-256"),
    ("tpu7x-128", 1, 64, 16, 4, "tpu7x-128"),  # As v5p.
    ("7x-16", 2, 16, 4, 4, "tpu7x-16"),
    ("h100-4", 1, 4, 1, 4, None),
    ("h100-64", 1, 64, 8, 8, None),
  ],
)
def test_hardware_is_counted(name, slices, chips, hosts, per_host, accelerator):
  found = hardware.load(name, slices)
  assert (found.chips, found.hosts, found.per_host) == (chips, hosts, per_host)
  # A chip of TPU7x is two devices.
  assert found.devices == chips * (2 if "7x" in name else 1)
  if accelerator:
    assert found.accelerator == accelerator


def test_names_of_cloud_tpu_are_aliases_and_the_nearest_name_is_suggested():
  names = ("v5litepod-256", "v5litepod:4x4", "v5e-256", "v5p-8", "h100-64", "tpu")
  assert [topology.own_name(name) for name in names] == [
    "v5e-256", "v5e:4x4", "v5e-256", "v5p-8", "h100-64", "tpu"
  ]  # fmt: skip
  assert topology.suggestion("a10-64", ("a100-64",)) == "did you mean a100-64? "
  assert hardware.load("H100-8") == hardware.load("h100-8")
  assert topology.suggestion("v5e-100") == "did you mean v5e-128? "
  with refused(UserError, "--topology is 'h10-8'", "did you mean h100-8?"):
    hardware.load("h10-8")
  with refused(UserError, "--topology is 'v6-256'", "did you mean v6e-256?"):
    topology.load("v6-256")
