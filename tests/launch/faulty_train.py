"""Runs launch.train and injects a fault: `python -m tests.launch.faulty_train FLAGS`.

FAULT=KIND:PROCESS:BATCHES selects what process PROCESS does after BATCHES batches: `stuck` hangs,
`error` raises an error. HEARTBEAT_SECONDS and SHUTDOWN_SECONDS replace the constants of the same
names.
"""

import os
import runpy
import time

import jax

from cm3leon_jax import distributed
from cm3leon_jax.errors import UserError
from cm3leon_jax.training import objective

BOUNDS = ("HEARTBEAT_SECONDS", "SHUTDOWN_SECONDS")


def wait_for_ever():
  while True:
    time.sleep(1)


def faulty_after(kind: str, count: int, data):
  for i, batch in enumerate(data):
    if i == count and kind == "stuck":
      wait_for_ever()
    if i == count:
      raise UserError("a fault of the test")
    yield batch


def insert(kind: str, process: int, count: int) -> None:
  batches = objective.RowObjective.batches

  def faulty(*args):
    data = batches(*args)
    return faulty_after(kind, count, data) if jax.process_index() == process else data

  objective.RowObjective.batches = faulty


if __name__ == "__main__":
  if "FAULT" in os.environ:
    fault, number, batches = os.environ["FAULT"].split(":")
    insert(fault, int(number), int(batches))
  for name in BOUNDS:
    if name in os.environ:
      setattr(distributed, name, int(os.environ[name]))
  runpy.run_module("cm3leon_jax.commands.train", run_name="__main__", alter_sys=True)
