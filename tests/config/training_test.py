import pytest

from cm3leon_jax.config.training import TrainConfig, on_mesh
from cm3leon_jax.errors import UserError
from tests.refusals import refused


@pytest.mark.parametrize(
  ("shards", "rows", "passes"), [(256, 4, 8), (128, 4, 16), (4, 4, 512), (512, 4, 4), (256, 32, 1)]
)
def test_the_mesh_sets_the_passes_of_a_batch(shards, rows, passes):
  config = on_mesh(TrainConfig(global_batch_size=8_192, rows_per_device=rows), shards)
  assert config.global_batch_size == 8_192
  assert config.gradient_accumulation_steps == passes
  assert config.micro_batch_size == shards * rows
  assert on_mesh(config, shards) == config


def test_without_rows_of_a_device_the_accumulation_counts():
  config = TrainConfig(global_batch_size=64, gradient_accumulation_steps=4)
  assert on_mesh(config, 8) is config


@pytest.mark.parametrize(
  "fields", [{"rows_per_device": 3}, {"rows_per_device": 64}, {"gradient_accumulation_steps": 64}]
)
def test_a_batch_that_the_mesh_cannot_split_is_refused_with_the_numbers(fields):
  with refused(UserError, "8192", "256 x", *fields):
    on_mesh(TrainConfig(global_batch_size=8_192, **fields), 256)
