"""Runs stages that process shards in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib

from etils import epath, epy

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  from cm3leon_jax.training.faults import lease as lease_lib


@contextlib.contextmanager
def stage(
  workdir: epath.Path, name: str, settings: Settings, more_inputs: Mapping[str, str] | None = None
) -> Iterator[dict | None]:
  """Runs the body as `stages.stage` does, while this job holds the lease on the stage's folder.

    with sharded.stage(workdir, "raw", settings) as summary:
      if summary is not None:
        summary.update(...)

  Yields the summary; None if the stage is finished.

  Raises:
    UserError: see `stages.stage`. Also if another job holds the lease on the folder, or has taken
      it from this job.
  """
  body = stages.stage(workdir, name, settings, more_inputs)
  # Take the lease first, because the stage deletes and writes files in the folder.
  with lease_lib.Lease(workdir / name) as lease, body as summary:
    yield summary
    lease.check()
