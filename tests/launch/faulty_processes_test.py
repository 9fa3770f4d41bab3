"""Tests that no process of a job waits for ever for one that is stuck, stopped or gone."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from cm3leon_jax import distributed
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.training.hang_watch import HUNG
from tests.distributed_test import free_port
from tests.launch.several_processes_test import losses, wait_for_steps
from tests.launch.stages_before import make_workdir
from tests.launch.tiny_config import get_config

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 100_000  # They never end by themselves.


@pytest.fixture
def workdir(tmp_path):
  make_workdir(tmp_path, settings_from_config(get_config()))
  return tmp_path


@pytest.fixture
def start(workdir):
  """Starts a job of two processes, each with its own log, that nothing else looks after."""
  jobs = []

  def start(*flags, **environment):
    port = free_port()
    for i in range(2):
      command = [
        sys.executable, "-m", "tests.launch.faulty_train", "--config=tests/launch/tiny_config.py",
        f"--workdir={workdir}", f"--coordinator_address=localhost:{port}", "--num_processes=2",
        f"--process_id={i}", "--config.mesh.fsdp=2", "--config.train.eval_every=1000000",
        "--config.train.sample_every=1000000", *flags,
      ]  # fmt: skip
      env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        **environment,
      }
      with (workdir / f"{i}.log").open("w") as log:
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    return jobs

  yield start
  for job in jobs:
    job.kill()
    job.wait()


def log(workdir, process):
  return (workdir / f"{process}.log").read_text()


def seconds_to_end(job, at_most):
  begin = time.monotonic()
  job.wait(at_most)
  return time.monotonic() - begin


@pytest.mark.slow
def test_a_process_that_is_stuck_is_named_and_the_job_ends(start, workdir):
  jobs = start(
    f"--config.train.steps={STEPS}", "--config.train.hang_minutes=0.25", FAULT="stuck:1:8"
  )
  for job in jobs:
    job.wait(240)
  logs = [log(workdir, i) for i in range(2)]
  assert [job.returncode for job in jobs] == [HUNG, HUNG], logs
  assert max(losses(workdir)) in (7, 8)
  sentence = r"process 1 on \S+ has not arrived: it is at step 8, waiting for data; process 0 is at"
  assert re.search(rf"{sentence} step (9|10), steps\.", logs[0])
  _, _, late = logs[0].partition("Threads of process 1:")
  assert "in wait_for_ever" in late
  assert "in wait_for_ever" in logs[1]
  assert "process 1 of 2 on " in logs[1]


@pytest.mark.slow
def test_the_others_of_a_killed_process_end_in_time(start, workdir):
  jobs = start(f"--config.train.steps={STEPS}")
  wait_for_steps(workdir, 3)
  jobs[1].send_signal(signal.SIGKILL)
  bound = distributed.HEARTBEAT_SECONDS + distributed.SHUTDOWN_SECONDS
  print("seconds after SIGKILL:", round(seconds_to_end(jobs[0], bound), 1), jobs[0].returncode)
  assert jobs[0].returncode not in (0, 2, 75)  # Launchers start the job again.


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_the_others_of_a_stopped_process_end_in_time(start, workdir, stopped):
  """Its connections stay open, as those of a host that lost its network."""
  jobs = start(f"--config.train.steps={STEPS}", HEARTBEAT_SECONDS="10")
  wait_for_steps(workdir, 3)
  jobs[stopped].send_signal(signal.SIGSTOP)
  other = jobs[1 - stopped]
  print("seconds after SIGSTOP:", round(seconds_to_end(other, 60), 1), other.returncode)
  assert other.returncode not in (0, 2, 75)
