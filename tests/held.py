"""Starts a process that holds the lease of a folder, like another job."""

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
  """Yields a process that holds the lease of a folder; it is killed at the end."""
  environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
  command = [sys.executable, "-c", HOLD, folder]
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as other:
    try:
      assert other.stdout.readline() == b"held\n"
      yield other
    finally:
      other.kill()
