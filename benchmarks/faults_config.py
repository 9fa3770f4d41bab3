"""Defines a run that takes a few seconds: --config=benchmarks/faults_config.py[:VARIANT]."""

import dataclasses

import ml_collections

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.task_files import read_tasks
from tests.generation import run
from tests.launch import tiny_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns a config with packed rows of texts and pairs, neighbors, and averaged parameters.

  Args:
    variant: "" saves, evaluates and samples often, sometimes at the same step. "elastic" has
      batches that are evenly divisible among 1, 2, 3 or 4 processes. "stages" runs all stages from
      raw data. "tasks" adds instructions and rewards to "stages".

  Raises:
    UserError: the variant is unknown.
  """
  if variant in ("stages", "tasks"):
    return _of_all_stages(variant == "tasks")
  config = tiny_config.get_config()
  config.train.update({"steps": 120, "eval_every": 12, "checkpoint_every": 8, "sample_every": 24})
  config.train.update({"global_batch_size": 4, "num_samples": 2, "log_every": 24})
  config.train.update({"tensorboard": False})
  config.evaluation.update({"num_documents": 8, "num_resamples": 100})
  if variant == "elastic":
    config.train.update({"global_batch_size": 12, "eval_every": 1_000, "sample_every": 1_000})
    config.train.update({"checkpoint_every": 1_000, "steps": 36})
  elif variant:
    raise UserError(
      f"config variant '{variant}' does not exist; it must be empty, 'elastic', 'stages' or "
      "'tasks'."
    )
  return config


def _of_all_stages(has_tasks: bool) -> ml_collections.ConfigDict:
  config = run.make_config()
  config.raw.update({"resolution": 8, "heldout_fraction": 0.1})
  config.vqgan.update({"steps": 200, "batch_size": 8, "checkpoint_every": 20})
  config.vqgan.update({"learning_rate": 1e-2, "warmup_steps": 5})
  config.clip.update({"steps": 60, "batch_size": 8, "checkpoint_every": 10})
  config.data.update({"text_share": 0.0, "pack_window": 16})
  config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 1, "ema_decay": 0.5})
  config.train.update({"steps": 6, "global_batch_size": 8, "eval_every": 3, "eval_batches": 1})
  config.train.update({"checkpoint_every": 2, "sample_every": 100, "tensorboard": False})
  config.evaluation.update({"num_resamples": 100})
  if has_tasks:
    tasks = [task for task in read_tasks("scenes") if task.name in ("draw", "count")]
    small = [dataclasses.replace(task, records=24, heldout_records=8) for task in tasks]
    config.instructions.own_tasks = tuple(dataclasses.asdict(task) for task in small)
    config.reinforce.update({"samples": 4, "heldout_prompts": 2, "reward": "clip"})
  return config
