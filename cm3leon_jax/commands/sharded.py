"""Defines the flags of commands that process shards in parallel."""

from absl import flags

from cm3leon_jax import shards
from cm3leon_jax.config import UserError

_RUNNER = flags.DEFINE_enum(
  "runner", "local", shards.RUNNERS, "Runs shards in this process or on Ray workers."
)
_ADDRESS = flags.DEFINE_string(
  "ray_address", "", "Ray cluster, e.g. auto or ray://host:10001; empty: one on this machine."
)
_WORKERS = flags.DEFINE_integer(
  "ray_workers", 1, "Number of Ray workers; each processes one shard at a time."
)
_CPUS = flags.DEFINE_float("ray_worker_cpus", 1.0, "CPUs that Ray reserves for a worker.")


def runner() -> shards.Runner:
  """Returns the runner that the flags select.

  Raises:
    UserError: a flag is out of range.
  """
  try:
    return shards.Runner(_RUNNER.value, _ADDRESS.value, _WORKERS.value, _CPUS.value)
  except ValueError as error:
    raise UserError(str(error)) from error
