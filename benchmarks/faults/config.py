"""Defines a run that takes a few seconds: --config=benchmarks/faults/config.py."""

import ml_collections

from tests.launch import tiny_config


def get_config() -> ml_collections.ConfigDict:
  """Returns a config with packed rows of texts and pairs, neighbors, and averaged parameters.

  The run saves, evaluates and samples often, sometimes at the same step.
  """
  config = tiny_config.get_config()
  config.train.update({"steps": 120, "eval_every": 12, "checkpoint_every": 8, "sample_every": 24})
  config.train.update({"global_batch_size": 4, "num_samples": 2, "log_every": 24})
  config.train.update({"tensorboard": False})
  config.evaluation.update({"num_documents": 8, "num_resamples": 100})
  return config
