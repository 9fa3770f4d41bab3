"""Compares the memory of a train step on an accelerator with the estimate of `cm3leon plan`."""

import jax
import jax.numpy as jnp
import pytest

from cm3leon_jax.commands import config_file
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.planning import memory, programs
from tests.device.devices import device_mesh

pytestmark = [pytest.mark.gpu, pytest.mark.tpu]


def test_a_step_takes_the_memory_that_the_plan_estimates():
  """Compiles four layers of the 350M model; an accelerator also runs the step once.

  The estimate of the state holds on any device. The whole estimate is not for CPUs.
  """
  config = config_file.load("cm3leon_350m")
  config.model.num_layers = 4
  config.train.update({"global_batch_size": 2, "rows_per_device": 2})
  settings, mesh = settings_from_config(config), device_mesh()
  device = mesh.devices.flat[0]
  expected = memory.estimate(settings, mesh.shape, device.platform)
  lowered = programs.train_step(settings, mesh)
  compiled = lowered.compile()
  found = compiled.memory_analysis()
  assert found.argument_size_in_bytes == pytest.approx(expected.state + expected.batch, rel=0.02)
  if device.platform == "cpu":
    return
  total = found.argument_size_in_bytes + found.temp_size_in_bytes
  assert 0.6 * expected.total < total < 1.1 * expected.total
  before = device.memory_stats()["bytes_in_use"]
  with jax.set_mesh(mesh):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), lowered.args_info[0])
    jax.block_until_ready(compiled(*zeros))
  assert device.memory_stats()["peak_bytes_in_use"] - before < 1.1 * expected.total
