"""Runs a stage's command in a separate process, and forwards its output, signals and errors."""

import collections
from collections.abc import Callable
import os
import signal
import subprocess
import sys

from etils import epath

from cm3leon_jax.commands.malloc import HUGE_PAGES
from cm3leon_jax.errors import CTRL_C, INTERRUPTED, UserError

TAIL = 15  # Number of lines to print from a stage that fails without an error message.


class StageEnded(UserError):
  """Error of a stage that did not finish, with its message and exit code."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.exit_code = code


def program(command: str) -> list[str]:
  """Returns the program and arguments that run a command, through `launch` or `cm3leon_jax`.

  The entry point is the one with which the user started this process.
  """
  module = [f"launch.{command}"] if "launch" in sys.modules else ["cm3leon_jax", command]
  return [sys.executable, "-m", *module]


class StageProcesses:
  """Runs commands one after the other, and forwards SIGTERM and Ctrl-C to the running command.

  Each command runs in a separate session, so Ctrl-C in a terminal reaches it only through this
  class.
  """

  def __init__(self, logs: epath.Path):
    self._logs, self._stop = logs, 0
    self._process: subprocess.Popen | None = None
    for number in (signal.SIGTERM, signal.SIGINT):
      # Keep an ignored signal ignored: scripts ignore SIGINT in background jobs.
      if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, self._forward)

  def _forward(self, number: int, _: object) -> None:
    self._stop = number
    if self._process is not None:
      self._process.send_signal(number)

  def run(self, command: str, flags: list[str], show: Callable[[str], None]) -> None:
    """Runs a command, appends its output to its log, and calls `show` with each line.

    Raises:
      StageEnded: the command failed, or a signal stopped it.
    """
    self._logs.mkdir(parents=True, exist_ok=True)
    path = self._logs / f"{command}.log"
    last: collections.deque[str] = collections.deque(maxlen=TAIL)
    self._check_stopped(command)
    process = subprocess.Popen(
      [*program(command), *flags], start_new_session=True, text=True, errors="replace",
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env={**HUGE_PAGES, **os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    self._process = process
    if self._stop:  # A signal arrived while the process started.
      process.send_signal(self._stop)
    with path.open("a") as log, process:
      for line in process.stdout or ():
        log.write(line)
        log.flush()
        last.append(line.rstrip("\n"))
        show(last[-1])
    code, self._process = process.returncode, None
    # The signal kills a command that does not handle it. The exit code is then negative.
    if code and not (self._stop and code < 0):
      _fail(command, code, list(last), path)
    self._check_stopped(command)

  def _check_stopped(self, command: str) -> None:
    """Raises StageEnded if a signal has arrived, even if the command has finished."""
    if self._stop:
      code = INTERRUPTED if self._stop == signal.SIGTERM else CTRL_C
      raise StageEnded(f"stopped at {command}: the same command continues.", code)


def _fail(command: str, code: int, lines: list[str], log: epath.Path) -> None:
  """Raises StageEnded with the stage's error message; without one, first prints `lines`."""
  sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
  if sentences:
    raise StageEnded(sentences[-1], code)
  if code in (INTERRUPTED, CTRL_C):
    raise StageEnded(f"{lines[-1] if lines else 'stopped'} ({command})", code)
  if code < 0:
    what = f"was killed by {signal.Signals(-code).name}: the same command continues"
    raise StageEnded(f"{command} {what}; {log} has its output.", 128 - code)
  print("\n".join(lines), file=sys.stderr)
  raise StageEnded(f"{command} ended with exit code {code}; {log} has its full output.", code)
