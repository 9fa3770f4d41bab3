"""Runs these tests on the default device of JAX: a GPU, a TPU, or a CPU as a rehearsal.

  python -m pytest -m "gpu or tpu" --confcutdir=tests/device tests/device

With --confcutdir, pytest does not read tests/conftest.py, which makes 8 CPU devices for all other
tests. Matrix products have full precision, so that results can be compared with those of the CPU.
"""

import jax
import pytest

from tests.device.devices import device_mesh

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_report_header():
  devices = jax.devices()
  return f"devices: {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"


def pytest_collection_modifyitems(items):
  """Leaves out kernels of another platform. A CPU runs all kernels in Pallas's interpreter."""
  platform = jax.devices()[0].platform
  if platform != "cpu":
    items[:] = [item for item in items if item.get_closest_marker(platform)]


@pytest.fixture
def on_device():
  """Makes a mesh of one default device current."""
  with jax.set_mesh(device_mesh()):
    yield
