import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cm3leon_jax import distributed
from cm3leon_jax.errors import INTERRUPTED, STOPPED_EARLY, TryAgain
from tests.launched import python

PROCESS = """
import sys
import jax
from cm3leon_jax import distributed
from cm3leon_jax.errors import TryAgain, UserError

# Libraries write to the process's standard output at any time, in the middle of a line, too.
sys.stdout = open(sys.argv[1], "w", encoding="utf-8")
if len(sys.argv) > 2:
  distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), 60)
else:
  distributed.initialize(None, None, None, 60)
me = jax.process_index()

def printed(function):
  try:
    function()
  except UserError as error:
    return f"{error}{' (again)' * (error.exit_code == TryAgain.exit_code)}"

def fail_in_second(kind):
  with distributed.together():
    if me == 1:
      raise kind("no " + "x" * 10)

print(distributed.gather({"me": "é" * me}), distributed.is_first())
distributed.print_once("printed")
print(printed(lambda: fail_in_second(UserError)))
try:
  print(printed(lambda: fail_in_second(OSError)))
except OSError as error:
  print("OSError", error)
print(printed(lambda: distributed.check_same_config({"train": {"steps": 5}})))
print(printed(lambda: distributed.check_same_config({"train": {"steps": 5 + me}})))
"""


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def slurm(process: int, port: str) -> dict[str, str]:
  job = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": 2}
  job |= {"PROCID": process, "LOCALID": process}
  job = {f"SLURM_{name}": str(value) for name, value in job.items()}
  return {"JAX_COORDINATOR_PORT": port, **job}


@pytest.mark.parametrize("cluster", ["flags", pytest.param("slurm", marks=pytest.mark.slow)])
def test_two_processes_come_to_the_same_decisions(cluster, tmp_path):
  port, jobs, printed = str(free_port()), [], [tmp_path / "first", tmp_path / "second"]
  for i in range(2):
    given, env = (["localhost:" + port, str(i)], {}) if cluster == "flags" else ([], slurm(i, port))
    command = [sys.executable, "-c", PROCESS, str(printed[i]), *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs.append(subprocess.Popen(command, env={**os.environ, **env}, **pipes))
  found = [job.communicate(timeout=120) for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0], found
  lines = [path.read_text("utf-8").splitlines() for path in printed]
  differ = (
    "process 1 has a different config than process 0 (train.steps: 5 -> 6): "
    "give all processes the same flags."
  )
  first = ["[{'me': ''}, {'me': 'é'}] True", "printed", "no " + "x" * 10]
  failed = f"process 1 failed with OSError: no {'x' * 10} (again)"
  assert lines[0] == [*first, failed, "None", differ]
  other = first[0].replace("True", "False")
  assert lines[1] == [other, first[2], f"OSError {first[2]}", "None", differ]


def test_one_process_needs_no_other():
  assert distributed.is_first()
  assert distributed.gather([1]) == [[1]]
  with pytest.raises(OSError, match="its own"), distributed.together():
    raise OSError("its own")


def test_a_coordinator_that_does_not_listen_is_a_user_error():
  address = f"localhost:{free_port()}"
  with pytest.raises(
    TryAgain,
    match=rf"--coordinator_address {address}: no process has listened there for 1 s \(.*refused\)",
  ):
    distributed.initialize(address, 2, 1, 1)


def test_a_missing_cluster_is_a_user_error():
  call = "from cm3leon_jax import distributed; distributed.initialize(None, None, None, 1)"
  result = python(call, timeout=60)
  reason = "this process cannot join its job (coordinator_address should be defined.)"
  assert f"UserError: {reason}" in result.stderr


# Program that blocks SIGTERM: a process that waits in native code runs no signal handlers.
WAITS = """
import signal, sys, time
from cm3leon_jax import distributed
distributed.TOGETHER_SECONDS = 4
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), 60)
distributed.gather(None)
distributed.stop_together()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open(sys.argv[3], "w").close()
time.sleep(60)
"""


@pytest.mark.slow
def test_processes_that_are_asked_to_stop_while_they_wait_all_end_with_its_code(tmp_path):
  """Process 0 hosts JAX's coordination service, so it must exit last; it is signaled first."""
  address, jobs, ready = f"localhost:{free_port()}", [], [tmp_path / "0", tmp_path / "1"]
  for i in range(2):
    command = [sys.executable, "-c", WAITS, address, str(i), str(ready[i])]
    jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
  try:
    while not all(path.exists() for path in ready):
      assert all(job.poll() is None for job in jobs)
      time.sleep(0.05)
    for job in jobs:
      job.send_signal(signal.SIGTERM)
      time.sleep(1.5)
    found = [job.communicate(timeout=60) for job in jobs]
  finally:
    for job in jobs:
      job.kill()
  assert [job.returncode for job in jobs] == [INTERRUPTED] * 2, found


# Program that receives the signal before its first step. The steps stop, and the process then takes
# longer than its time limit.
TAKEN_OVER = """
import signal, sys, time
import jax
from cm3leon_jax import distributed
from cm3leon_jax.training.faults.preemption import StopSignal
distributed.TOGETHER_SECONDS, distributed.FIRST_WAITS_SECONDS = 1, 0
mesh = jax.make_mesh((1,), ("data",))
distributed.stop_together()
signal.raise_signal(signal.SIGTERM)
time.sleep(0.2)
with StopSignal(mesh) as stop:
  stop.after(1, None, {})
  print("stopping", stop.code, flush=True)
time.sleep(1.5)
print("ended", flush=True)
signal.raise_signal(signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_signal_that_the_steps_took_over_ends_no_process_after_them():
  result = python(TAKEN_OVER, timeout=60)
  lines = [f"stopping {INTERRUPTED}", "ended", STOPPED_EARLY]
  assert result.stdout.splitlines() == lines, result.stderr
  assert result.returncode == INTERRUPTED
