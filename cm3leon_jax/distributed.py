"""Connects the processes of a job and lets them agree on decisions."""

from collections.abc import Iterator
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import types
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from cm3leon_jax.errors import CTRL_C, INTERRUPTED, STOPPED_EARLY, TryAgain, UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.stages import stages

# If a process is killed, suspended or disconnected, the other processes exit after this many
# seconds.
HEARTBEAT_SECONDS = 100
# The first process to exit waits this long for the others. If it is the only one that failed, the
# job ends after the wait.
SHUTDOWN_SECONDS = 60
# A process that received a signal waits this long for the next `gather`, so that all processes exit
# together. Most schedulers kill a process 30 s after the signal.
TOGETHER_SECONDS = 20
# Process 0 waits this much longer than the other processes. When process 0 exits, JAX's
# coordination service ends, and processes that still run abort with exit code 134.
FIRST_WAITS_SECONDS = 5

# Exit codes of the signals that this process received outside the training steps. A signal handler
# appends the codes.
_asked: list[int] = []
# Timers that end the process some time after a signal. A thread starts them, because Python runs no
# signal handler while the process waits in native code.
_exits: list[threading.Timer] = []


def initialize(
  coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
  """Connects this process to the other processes of its job. Call it before any other use of JAX.

  If the first three arguments are None, JAX reads them from the cluster: a TPU pod (also GKE and
  multislice), SLURM, Open MPI or Kubernetes.

  Args:
    coordinator: host:port on which process 0 listens.
    process_id: number of this process, in [0, num_processes).
    timeout: number of seconds for which the processes wait for each other.

  Raises:
    UserError: an argument is missing or wrong, or no cluster was found.
    TryAgain: the other processes did not start in time.
  """
  # JAX's preemption service would catch SIGTERM; see training/faults/preemption.py.
  jax.config.update("jax_enable_preemption_service", False)
  if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
    raise UserError(f"--coordinator_address is '{coordinator}'; it must be host:port.")
  if coordinator is not None and process_id:
    _wait_for(coordinator, timeout)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=timeout,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
  except ValueError as error:
    raise UserError(
      f"this process cannot join its job ({error}): give --coordinator_address, --num_processes "
      "and --process_id, or, if the cluster sets them, --distributed alone."
    ) from error
  except RuntimeError as error:
    raise TryAgain(
      f"the processes of the job did not connect within {timeout} s ({error}): start all of them."
    ) from error


def _wait_for(coordinator: str, timeout: int) -> None:
  """Waits until the coordinator listens, since JAX aborts without an exception if it does not."""
  host, _, port = coordinator.rpartition(":")
  end = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise TryAgain(
          f"--coordinator_address {coordinator}: no process has listened there for {timeout} s "
          f"({error}); it must be an address of the host of --process_id=0, which must be running."
        ) from error
    time.sleep(0.2)


def is_first() -> bool:
  """Returns whether this is process 0, which writes the files of the job."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def are_several() -> bool:
  """Returns whether the job has more than one process."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def print_once(sentence: str) -> None:
  """Prints a line in process 0 only."""
  if is_first():
    print(sentence, flush=True)


def stop_together() -> None:
  """Makes SIGTERM and Ctrl-C outside the training steps end all processes of the job together.

  If only one process exited, the other processes would fail with an error. So all processes exit
  with the same exit code at the next `gather`. After TOGETHER_SECONDS without a `gather`, or after
  a second Ctrl-C, this process exits without the others. A thread ends the process, because Python
  runs no signal handler while the process waits for another process in native code. If
  `asked_to_stop` returns an exit code, its caller must end the process.
  """
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  for number in (signal.SIGTERM, signal.SIGINT):
    if signal.getsignal(number) is not signal.SIG_IGN:  # Shells ignore SIGINT for background jobs.
      signal.signal(number, _note)
  seconds = TOGETHER_SECONDS + FIRST_WAITS_SECONDS * is_first()
  threading.Thread(target=_hear, args=(reading, seconds), name="signals", daemon=True).start()


def _note(number: int, _: types.FrameType | None) -> None:
  if number == signal.SIGINT and _asked:
    raise KeyboardInterrupt
  _asked.append(_code(number))


def _code(number: int) -> int:
  return CTRL_C if number == signal.SIGINT else INTERRUPTED


def _hear(reading: int, seconds: float) -> None:
  """Waits for signals. Each signal starts a timer, which ends the process after `seconds`."""
  while True:
    number = os.read(reading, 1)[0]
    if signal.getsignal(number) is _note:
      timer = threading.Timer(seconds, _exit_alone, [number])
      timer.daemon = True
      _exits.append(timer)
      timer.start()


def _exit_alone(number: int) -> None:
  if signal.getsignal(number) is _note:
    _tell()
    os._exit(_code(number))


def _tell() -> None:
  sys.stdout.flush()
  os.write(1, f"{STOPPED_EARLY}\n".encode())


def asked_to_stop() -> int:
  """Returns the exit code of the signals received so far, or 0, and forgets the signals."""
  # SIGTERM has the smaller exit code, so it takes precedence over Ctrl-C.
  code = min(_asked, default=0)
  _asked.clear()
  while _exits:
    _exits.pop().cancel()
  return code


def gather(value: Any) -> list[Any]:
  """Gathers a JSON value from every process, in process order. All processes must call it.

  If a process received a signal (see `stop_together`), all processes exit here.
  """
  if not are_several():
    return [value]
  result = _exchange([value, min(_asked, default=0)])
  if codes := [code for _, code in result if code]:
    if is_first():
      _tell()
    sys.exit(min(codes))
  return [value for value, _ in result]


def _exchange(value: Any) -> list[Any]:
  message = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(message)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(message)] = message
  return [
    json.loads(bytes(row[:size]))
    for row, size in zip(multihost_utils.process_allgather(padded), sizes)
  ]


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Runs the body of `with` in all processes and waits until each has finished it or failed.

  Raises:
    UserError: the body raised UserError or TryAgain in a process; all processes raise this error.
      If the body raised another error in a process, that process raises the other error, and the
      other processes raise TryAgain with a description of it.
  """
  failure: Exception | None = None
  message, crash = "", False
  try:
    yield
  except UserError as error:
    failure, message, crash = error, str(error), isinstance(error, TryAgain)
  except Exception as error:
    failure, crash = error, True
    message = f"process {jax.process_index()} failed with {type(error).__name__}: {error}"
  result = gather([message, crash])
  first, again = next((x for x in result if x[0]), ("", False))
  if failure is not None and not isinstance(failure, UserError):
    raise failure
  if first:
    raise (TryAgain if again else UserError)(first) from failure


def once(
  folder: epath.PathLike, config: dict, redo: bool = False
) -> contextlib.AbstractContextManager[dict | None]:
  """Calls `stages.once` in all processes of the job; process 0 writes done.json."""
  return stages.once(folder, config, redo, writes=is_first(), together=together)


def check_same_config(config: dict) -> None:
  """Raises UserError in all processes if their configs differ; the message names the fields."""
  first, *others = gather(plain(config))
  for i, other in enumerate(others, 1):
    if changed := stages.differences(first, other):
      raise UserError(
        f"process {i} has a different config than process 0 ({'; '.join(changed[:4])}): "
        "give all processes the same flags."
      )
