"""Defines the config for tests that run protocols in separate processes."""

from tests.generation.run import make_config


def get_config():
  config = make_config(positions=512)
  config.evaluation.update({"num_resamples": 100, "batch_size": 8})
  config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
  return config
