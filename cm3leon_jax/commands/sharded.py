"""Runs stages that process shards in parallel, and defines the flags of their commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib

from absl import flags
from etils import epath, epy

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.files import shards
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  from cm3leon_jax.training.faults import lease as lease_lib

_RUNNER = flags.DEFINE_enum(
  "runner", "local", shards.RUNNERS, "Process shards in this process or on Ray workers."
)
_ADDRESS = flags.DEFINE_string(
  "ray_address", "", "Ray cluster, e.g. auto or ray://host:10001; empty: start one on this machine."
)
_WORKERS = flags.DEFINE_integer(
  "ray_workers", 1, "Number of Ray workers; each processes one shard at a time.", 1
)
_CPUS = flags.DEFINE_float("ray_worker_cpus", 1.0, "CPUs that Ray reserves for each worker.")


@contextlib.contextmanager
def stage(
  workdir: epath.Path, name: str, settings: Settings, more_inputs: Mapping[str, str] | None = None
) -> Iterator[tuple[dict | None, shards.Runner]]:
  """Runs the body as `stages.stage` does, while this job holds the lease on the stage's folder.

    with sharded.stage(workdir, "raw", settings) as (summary, runner):
      if summary is not None:
        summary.update(...)

  Yields the summary (None if the stage is finished), and the runner that the flags select.

  Raises:
    UserError: see `stages.stage`. Also if another job holds the lease on the folder, or has taken
      it from this job.
  """
  runner = shards.Runner(_RUNNER.value, _ADDRESS.value, _WORKERS.value, _CPUS.value)
  body = stages.stage(workdir, name, settings, more_inputs)
  # Take the lease first, because the stage deletes and writes files in the folder.
  with lease_lib.Lease(workdir / name) as lease, body as summary:
    yield summary, runner
    lease.check()
