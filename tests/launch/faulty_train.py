"""Runs launch.train with a fault: `python -m tests.launch.faulty_train FLAGS`.

FAULT=stuck:PROCESS:BATCHES lets a process wait for ever for its next batch after some batches;
HEARTBEAT_SECONDS sets how long the others of a job wait for a process that gives no sign of life.
"""

import os
import runpy
import time

import jax

from cm3leon_jax import distributed
from cm3leon_jax.training import objective


def wait_for_ever():
  while True:
    time.sleep(1)


def stuck_after(count: int, data):
  for i, batch in enumerate(data):
    if i == count:
      wait_for_ever()
    yield batch


def insert(process: int, count: int) -> None:
  begin = objective.Rows.begin

  def faulty(*args):
    take_step, data = begin(*args)
    return take_step, stuck_after(count, data) if jax.process_index() == process else data

  objective.Rows.begin = faulty


if __name__ == "__main__":
  if "FAULT" in os.environ:
    insert(*map(int, os.environ["FAULT"].split(":")[1:]))
  if "HEARTBEAT_SECONDS" in os.environ:
    distributed.HEARTBEAT_SECONDS = int(os.environ["HEARTBEAT_SECONDS"])
  runpy.run_module("cm3leon_jax.commands.train", run_name="__main__", alter_sys=True)
