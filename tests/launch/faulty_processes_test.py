"""Tests that no process waits forever for a process that hangs, is stopped, dies or exits."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from cm3leon_jax import distributed
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import CTRL_C, INTERRUPTED, STOPPED_EARLY
from cm3leon_jax.training.faults.hang_watch import HUNG
from tests.distributed_test import free_port
from tests.launch.several_processes_test import losses, wait_for_steps
from tests.launch.stages_before import make_workdir
from tests.launch.tiny_config import get_config

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 100_000  # Large enough that no job finishes on its own.


@pytest.fixture
def workdir(tmp_path):
  make_workdir(tmp_path, settings_from_config(get_config()))
  return tmp_path


@pytest.fixture
def start(workdir):
  """Returns a function that starts the processes of a job, each with its own log."""
  everyone = []

  def start(*flags, processes=2, **environment):
    port, jobs = free_port(), []
    # The parameters are not divisible among 3 processes.
    axis = "fsdp" if processes == 2 else "data"
    for i in range(processes):
      command = [
        sys.executable, "-m", "tests.launch.faulty_train", "--config=tests/launch/tiny_config.py",
        f"--workdir={workdir}", f"--coordinator_address=localhost:{port}",
        f"--num_processes={processes}", f"--process_id={i}", f"--config.mesh.{axis}={processes}",
        f"--config.train.global_batch_size={4 * processes}",
        "--config.train.eval_every=1000000", "--config.train.sample_every=1000000", *flags,
      ]  # fmt: skip
      one_device = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
      env = {**os.environ, "PYTHONPATH": str(ROOT), **one_device, **environment}
      with (workdir / f"{i}.log").open("w") as log:
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    everyone.extend(jobs)
    return jobs

  yield start
  for job in everyone:
    job.kill()
    job.wait()


def log(workdir, process):
  return (workdir / f"{process}.log").read_text()


def seconds_to_end(job, at_most):
  begin = time.monotonic()
  job.wait(at_most)
  return time.monotonic() - begin


def wait_for_line(workdir, process, start, seconds=240):
  for _ in range(10 * seconds):
    if any(line.startswith(start) for line in log(workdir, process).splitlines()):
      return
    time.sleep(0.1)
  raise AssertionError(f"no line starts with '{start}' in {log(workdir, process)}")


def sealed(workdir):
  folder = workdir / "train" / "checkpoints.digests"
  return sorted(int(path.stem) for path in folder.glob("*.json"))


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
  assert re.search(r"process 0 of 2 on \S+ is at step (9|10), steps\.", logs[0])
  assert re.search(r"process 1 of 2 on \S+ is at step 8, waiting for data\.", logs[1])
  assert "in wait_for_ever" in logs[1]


@pytest.mark.slow
def test_the_others_of_a_stopped_process_end_in_time(start, workdir):
  """The stopped process keeps its connections open, as on a host that lost its network."""
  jobs = start(f"--config.train.steps={STEPS}", HEARTBEAT_SECONDS="10")
  wait_for_steps(workdir, 3)
  jobs[0].send_signal(signal.SIGSTOP)
  other = jobs[1]
  print("seconds after SIGSTOP:", round(seconds_to_end(other, 60), 1), other.returncode)
  assert other.returncode not in (0, 2, 75)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("signaled", "number", "code"), [(1, signal.SIGTERM, INTERRUPTED), (0, signal.SIGINT, CTRL_C)]
)
def test_a_signal_before_the_steps_ends_all_processes_with_its_code(
  start, workdir, signaled, number, code
):
  jobs = start(f"--config.train.steps={STEPS}", SHUTDOWN_SECONDS="30")
  wait_for_line(workdir, 0, "rows: ")
  begin = time.monotonic()
  jobs[signaled].send_signal(number)
  for job in jobs:
    job.wait(60)
  seconds = time.monotonic() - begin
  print("seconds after the signal:", round(seconds, 1))
  logs = [log(workdir, i) for i in range(2)]
  assert [job.returncode for job in jobs] == [code, code], logs
  assert seconds < distributed.TOGETHER_SECONDS
  assert logs[0].splitlines()[-1] == STOPPED_EARLY
  assert STOPPED_EARLY not in logs[1]
  assert not (workdir / "train" / "lease.json").exists()
  assert sealed(workdir) == []


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_ends_the_other_in_time(start, workdir, failing):
  fault = {"FAULT": f"error:{failing}:6", "SHUTDOWN_SECONDS": "10"}
  jobs = start(f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=2", **fault)
  jobs[failing].wait(240)
  seconds = seconds_to_end(jobs[1 - failing], 30)
  codes = [job.returncode for job in jobs]
  print("seconds after the other one:", round(seconds, 1), codes)
  assert "error: a fault of the test" in log(workdir, failing)
  assert 0 not in codes
  assert sealed(workdir)[-1] in (4, 6)


@pytest.mark.slow
def test_three_processes_stop_at_one_step_continue_and_end_when_one_is_killed(start, workdir):
  flags = (f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=1000000")
  jobs = start(*flags, processes=3)
  wait_for_steps(workdir, 3)
  for job in jobs:
    job.send_signal(signal.SIGTERM)
  for job in jobs:
    job.wait(120)
  assert [job.returncode for job in jobs] == [INTERRUPTED] * 3
  (stopped,) = sealed(workdir)
  assert max(losses(workdir)) == stopped
  found = losses(workdir)
  jobs = start(*flags, processes=3)
  wait_for_steps(workdir, stopped + 3)
  assert {step: losses(workdir)[step] for step in found} == found
  jobs[2].send_signal(signal.SIGKILL)
  bound = distributed.HEARTBEAT_SECONDS + distributed.SHUTDOWN_SECONDS
  seconds = [round(seconds_to_end(job, bound), 1) for job in jobs[:2]]
  print("seconds after SIGKILL:", seconds, [job.returncode for job in jobs])
  assert all(job.returncode not in (0, 2, 75) for job in jobs[:2])
  assert sealed(workdir) == [stopped]
