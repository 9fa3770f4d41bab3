import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.planning import hardware
from tests.refusals import refused


@pytest.mark.parametrize(
  ("name", "slices"),
  [
    ("v5e-200", 1),
    ("v5litepod-100", 1),
    ("v5p-9999", 1),
    ("v5e256", 1),
    ("h10-64", 1),
    ("tpu", 1),
    ("h100-12", 1),
    ("h100-0", 1),
    ("h100-64", 2),
    ("v4-8", 1),
    ("v2:2x2", 1),
  ],
)
def test_unknown_hardware_is_refused(name, slices):
  with refused(UserError):
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
  if accelerator:
    assert found.accelerator == accelerator


def test_a_name_of_cloud_tpu_is_ours():
  assert hardware.load("v5litepod-256") == hardware.load("v5e-256")


@pytest.mark.parametrize(
  ("name", "requests"),
  [("v5e-256", (56, 96)), ("v5e-8", (112, 192)), ("v6e:1x1", (22, 88)), ("v5p:1x1x1", (104, 224))],
)
def test_half_of_a_machine_is_asked_for(name, requests):
  assert hardware.load(name).requests == requests


@pytest.mark.parametrize(
  ("name", "devices"), [("tpu7x-128", 128), ("v5p-128", 64), ("v6e-256", 256), ("b200-64", 64)]
)
def test_a_chip_of_tpu7x_is_two_devices(name, devices):
  assert hardware.load(name).devices == devices
