"""Every test sees 8 CPU devices; hidden rank promotion and a wrong annotation are errors."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# On a busy machine 8 device threads may need more than 40 s to meet; then XLA ends the process.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
from jaxtyping import install_import_hook
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
CHECKED = [f"cm3leon_jax.{package}" for package in ("clip", "decoding", "models", "training")]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="session")
def ray_address():
  """A Ray cluster of this machine's, with two CPUs."""
  ray = pytest.importorskip("ray")
  ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
  yield "auto"
  ray.shutdown()
