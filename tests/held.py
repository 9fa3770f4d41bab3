"""Starts a process that owns the lease of a folder, as another job would."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import subprocess
import sys

HOLD = """
import sys, time
from cm3leon_jax.training.faults import lease
lease.BEAT_SECONDS = 0.1
with lease.Lease(sys.argv[1]):
  print("held", flush=True)
  time.sleep(120)
"""


@contextlib.contextmanager
def held(folder: os.PathLike) -> Iterator[subprocess.Popen]:
  """Yields a process that owns the lease of a folder, and kills it at the end."""
  environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
  command = [sys.executable, "-c", HOLD, folder]
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as other:
    try:
      assert other.stdout.readline() == b"held\n"
      yield other
    finally:
      other.kill()
