"""The flags of commands that work in shards: where they do it."""

from absl import flags

from cm3leon_jax import shards
from cm3leon_jax.config import UserError

_RUNNER = flags.DEFINE_enum(
  "runner", "local", shards.RUNNERS, "Who works on the shards: this process, or Ray's workers."
)
_ADDRESS = flags.DEFINE_string(
  "ray_address", "", "Ray cluster, e.g. auto or ray://host:10001; empty: one on this machine."
)
_WORKERS = flags.DEFINE_integer(
  "ray_workers", 1, "Workers of Ray, each of which does one shard at a time."
)
_CPUS = flags.DEFINE_float("ray_worker_cpus", 1.0, "CPUs that Ray sets aside for a worker.")


def runner() -> shards.Runner:
  """What the flags say. Raises UserError naming a flag out of range."""
  try:
    return shards.Runner(_RUNNER.value, _ADDRESS.value, _WORKERS.value, _CPUS.value)
  except ValueError as error:
    raise UserError(str(error)) from error
