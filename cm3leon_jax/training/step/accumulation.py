"""Sets the number of micro-batches per step from the size of the mesh."""

from __future__ import annotations

import dataclasses

from cm3leon_jax.config import UserError
from cm3leon_jax.training.config import TrainConfig


def on_mesh(config: TrainConfig, shards: int) -> TrainConfig:
  """Replaces `rows_per_device`, if it is set, by the number of micro-batches on a mesh.

  For `shards`, see `mesh.batch_shards`.

    on_mesh(TrainConfig(global_batch_size=8_192, rows_per_device=4), 256)
    TrainConfig(global_batch_size=8_192, gradient_accumulation_steps=8, rows_per_device=0)

  Raises:
    UserError: the mesh cannot split the batch.
  """
  rows, name = config.gradient_accumulation_steps, "gradient_accumulation_steps"
  if config.rows_per_device:
    rows, name = config.rows_per_device, "rows_per_device"
  parts = shards * rows
  if config.global_batch_size % parts:
    raise UserError(
      f"config.train.global_batch_size is {config.global_batch_size}; mesh.data x mesh.fsdp x "
      f"mesh.fsdp_inner x train.{name} = {shards} x {rows} = {parts} must divide it."
    )
  if not config.rows_per_device:
    return config
  steps = config.global_batch_size // parts
  return dataclasses.replace(config, gradient_accumulation_steps=steps, rows_per_device=0)
