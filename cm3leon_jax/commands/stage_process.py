"""Runs the command of a stage in a process of its own: its lines, its signals, its end."""

import collections
from collections.abc import Callable
import os
import shutil
import signal
import subprocess
import sys

from etils import epath

from cm3leon_jax.config import CTRL_C, INTERRUPTED, UserError

TAIL = 15  # Lines of a stage that fails without a sentence, which are shown.
# The train step of a small decoder on a CPU takes 20 to 25% less time if malloc asks Linux for huge
# pages; other systems ignore this.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class StageEnded(UserError):
  """A stage that did not finish: its sentence, and its exit code."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.exit_code = code


def program(command: str) -> list[str]:
  """Returns what runs a command as the user started this one: `cm3leon`, or `launch`."""
  module = [f"launch.{command}"] if "launch" in sys.modules else ["cm3leon_jax", command]
  return [sys.executable, "-m", *module]


class StageProcesses:
  """Runs commands one after the other; SIGTERM and Ctrl-C go to the one that runs.

  Each is the leader of a session: Ctrl-C in a terminal reaches it once, from here.
  """

  def __init__(self, logs: epath.Path):
    self._logs, self._stop = logs, 0
    self._process: subprocess.Popen | None = None
    for number in (signal.SIGTERM, signal.SIGINT):
      if signal.getsignal(number) is not signal.SIG_IGN:  # As in the background of a script.
        signal.signal(number, self._forward)

  def _forward(self, number: int, _: object) -> None:
    self._stop = number
    if self._process is not None:
      self._process.send_signal(number)

  def run(self, command: str, flags: list[str], show: Callable[[str], None]) -> None:
    """Runs a command and appends what it prints to its log.

    Args:
      command: name of the command.
      flags: its flags.
      show: called with each line that it prints.

    Raises:
      StageEnded: it failed, or a signal stopped it.
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
    if self._stop:  # While it was started.
      process.send_signal(self._stop)
    with path.open("a") as log, process:
      for line in process.stdout or ():
        log.write(line)
        log.flush()
        last.append(line.rstrip("\n"))
        show(last[-1])
    code, self._process = process.returncode, None
    if code and not (self._stop and code < 0):  # A command without a loop that saves.
      _fail(command, code, list(last), path)
    self._check_stopped(command)

  def _check_stopped(self, command: str) -> None:
    """Raises StageEnded if a signal came before a command, or ended it, or it finished first."""
    if self._stop:
      code = INTERRUPTED if self._stop == signal.SIGTERM else CTRL_C
      raise StageEnded(f"stopped at {command}: the same command continues.", code)


def _fail(command: str, code: int, lines: list[str], log: epath.Path) -> None:
  """Raises StageEnded with the sentence of a stage; prints its last lines if it has none."""
  sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
  if sentences:
    raise StageEnded(sentences[-1], code)
  if code in (INTERRUPTED, CTRL_C):
    raise StageEnded(f"{lines[-1] if lines else 'stopped'} ({command})", code)
  if code < 0:
    what = f"was killed by {signal.Signals(-code).name}: the same command continues"
    raise StageEnded(f"{command} {what}; {log} has what it printed.", 128 - code)
  print("\n".join(lines), file=sys.stderr)
  raise StageEnded(f"{command} ended with exit code {code}; {log} has all that it printed.", code)


def width() -> int:
  """Returns the width of the terminal in characters."""
  return shutil.get_terminal_size().columns
