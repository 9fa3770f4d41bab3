"""A run of seconds for `benchmarks.faults`: --config=benchmarks/faults_config.py[:elastic]."""

import ml_collections

from cm3leon_jax.config import UserError
from tests.launch import tiny_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the config: packed rows of pairs with neighbors and of texts; an average is kept.

  Args:
    variant: "" saves, evaluates and samples often, at steps of which some coincide; "elastic" has
      batches that 1, 2, 3 and 4 processes can split.

  Raises:
    UserError: another variant.
  """
  config = tiny_config.get_config()
  config.train.update({"steps": 120, "eval_every": 12, "checkpoint_every": 8, "sample_every": 24})
  config.train.update({"global_batch_size": 4, "num_samples": 2, "log_every": 24})
  config.train.update({"tensorboard": False})
  config.evaluation.update({"num_documents": 8, "num_resamples": 100})
  if variant == "elastic":
    config.train.update({"global_batch_size": 12, "eval_every": 1_000, "sample_every": 1_000})
    config.train.update({"checkpoint_every": 1_000, "steps": 36})
  elif variant:
    raise UserError(f"config variant '{variant}' does not exist; it must be empty or 'elastic'.")
  return config
