"""Ends a run that hangs, and first prints where each of its processes waits."""

from collections.abc import Callable
from concurrent import futures
import contextlib
import faulthandler
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from typing import Any, TypeVar

from etils import epath
import jax

from cm3leon_jax import distributed
from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.watch.goodput import PHASES, Stopwatch

FOLDER = "hang"
HUNG = TryAgain.exit_code  # Launchers restart a job with this exit code a limited number of times.
# A step that takes this many times as long as the longest earlier step counts as hanging.
LONGEST = 10
# Compiling, evaluating, saving, sampling and restoring may take this multiple of a step's limit.
SLOW = 4
COMPILED = 3  # When this step begins, the first step has ended, so the steps are compiled.
POLL_SECONDS = 5.0
FILE_SECONDS = 20.0  # Time limit for reading or writing reports: a GCS bucket may hang.
READERS = 32  # Number of reports that are read in parallel.
# Seconds that a process waits between its timeout and its exit. When it exits, the other processes
# fail; until then, they can print their stacks. Process 0, which runs JAX's service, waits twice as
# long.
LINGER_SECONDS = 10.0
# Phases in the order in which a process passes them after it has dispatched a step.
ORDER = ("restore", "step", "evaluate", "save", "sample", "profile", "data")
T = TypeVar("T")


def place(report: dict) -> str:
  """Describes where a process is, e.g. "step 41, waiting for data"."""
  return f"step {report['step']:,}, {PHASES.get(report['doing'], report['doing'])}"


def verdict(reports: dict[int, dict | None]) -> tuple[str, list[int]]:
  """Finds the processes for which all other processes wait.

    {0: {"step": 42, "doing": "step", "host": "a"}, 1: {"step": 41, "doing": "data", "host": "b"}}
    -> "process 1 on b has not arrived: it is at step 41, waiting for data; process 0 is at step 42,
    steps", [1]

  `reports` maps the index of a process to its report, or to None if it wrote no report. Returns a
  sentence without its final period, and the indices of the missing processes that it names.
  """
  silent = [i for i, report in reports.items() if report is None]
  known = {i: report for i, report in reports.items() if report is not None}
  if silent:
    names = ", ".join(map(str, silent))
    return f"process {names} does not respond: it was killed, suspended or disconnected", silent
  keys = {i: (r["step"], ORDER.index(r["doing"])) for i, r in known.items()}
  first, last = min(keys.values()), max(keys.values())
  late = [i for i, key in keys.items() if key == first]
  if first == last:
    everyone = f"all {len(known)} processes are at {place(known[late[0]])}"
    return f"{everyone}: look at the devices and the network between them", []
  ahead = next(i for i, key in keys.items() if key == last)
  named = "; ".join(
    f"process {i} on {known[i]['host']} has not arrived: it is at {place(known[i])}" for i in late
  )
  return f"{named}; process {ahead} is at {place(known[ahead])}", late


class HangWatch(Hook):
  """Ends the process with exit code `HUNG` if the loop makes no progress inside a `with` block.

  A thread watches the loop. Progress means that a batch is read, a step is dispatched, or the
  Stopwatch enters a new phase. After half of the time limit without progress, each process of a job
  with several processes writes a report to `folder/hang/PROCESS.json`: where it is, and the stacks
  of its threads. After the full time limit each process prints its stacks. Process 0 also prints
  the stacks of the processes for which it waits. While the loop makes progress, the watch neither
  writes reports nor communicates.

  The time limit is `minutes`, or LONGEST times the longest step so far if this is longer. The first
  steps, which compile, and phases other than steps have SLOW times this limit.
  """

  def __init__(
    self, folder: epath.Path, minutes: float, watch: Stopwatch,
    end: Callable[[int], None] = os._exit, clock: Callable[[], float] = time.monotonic,
  ):  # fmt: skip
    """Creates a watch, which starts in its `with` block.

    Args:
      minutes: time limit without progress; 0 disables the watch.
      end: ends the process with an exit code. The default skips clean-up, which could hang, too.
      clock: returns the time in seconds.
    """
    self._folder, self._allowed, self._stopwatch = folder / FOLDER, 60 * minutes, watch
    self._end, self._clock = end, clock
    self._steps = self._taken = 0
    self._in_steps = self._longest = 0.0
    self._reading = self._reported = self._warned = False
    self._sign = self._looked = clock()
    self._start = ""
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)

  def __enter__(self) -> "HangWatch":
    self._sign = self._looked = self._clock()
    if self._allowed:
      self._start = distributed.gather(secrets.token_hex(8))[0]
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()

  def continue_after(self, step: int) -> None:
    """Sets the step after which the run continues. Reports show it until the next step begins."""
    self._steps = step

  def before(self, step: int) -> None:
    self._reading = True

  def ready(self, step: int) -> None:
    """See `Hook`. Measures the time of the previous step, excluding phases other than steps."""
    self._reading = False
    seconds = self._stopwatch.seconds()
    before, self._in_steps = self._in_steps, seconds["step"] + seconds["data"]
    if self._taken >= COMPILED:
      self._longest = max(self._longest, self._in_steps - before)
    self._steps = step
    self._taken += 1
    self._sign = self._clock()

  def after(self, step: int, state: Any, metrics: dict) -> None:
    self._sign = self._clock()

  def _doing(self) -> str:
    phase = self._stopwatch.standing()[0]
    return "data" if self._reading and phase == "step" else phase

  def _run(self) -> None:
    while not self._stop.wait(min(POLL_SECONDS, self._allowed / 20)):
      self.look()

  def look(self) -> None:
    """Warns, writes a report or ends the run, depending on the time since the last progress."""
    now = self._clock()
    if now - self._looked > POLL_SECONDS + self._allowed / 4:
      self._sign = now  # The whole process was suspended (Ctrl-Z, a debugger).
    self._looked = now
    base = max(self._allowed, LONGEST * self._longest)
    steady = self._doing() in ("step", "data") and self._taken >= COMPILED
    limit = base if steady else SLOW * base
    idle = min(self._clock() - self._sign, self._stopwatch.standing()[1])
    if idle > limit:
      self._give_up(idle)
    elif idle > base / 2 and not self._reported:
      self._reported = True
      if jax.process_count() > 1:
        report = {**self._report(idle), "stacks": stacks()}
        _within(FILE_SECONDS, lambda: write_json(self._path(), report))
    elif idle <= base / 2 and self._reported:
      self._reported = self._warned = False
      _within(FILE_SECONDS, lambda: self._path().unlink(missing_ok=True))
    if limit / 2 < idle <= limit and not self._warned:
      self._warned = True
      distributed.print_once(
        f"train: warning: no progress for {idle / 60:.3g} minutes at {place(self._report(idle))}; "
        f"after {limit / 60:.3g} the job ends with exit code {HUNG} (train.hang_minutes)."
      )

  def _path(self, process: int | None = None) -> epath.Path:
    return self._folder / f"{jax.process_index() if process is None else process}.json"

  def _report(self, idle: float) -> dict:
    return {
      "start": self._start,
      "process": jax.process_index(),
      "host": socket.gethostname(),
      "step": self._steps,
      "doing": self._doing(),
      "seconds": round(idle, 1),
    }

  def _read_report(self, process: int) -> dict | None:
    with contextlib.suppress(UserError):  # A report may be missing or incomplete.
      report = read_json(self._path(process))
      if report.get("start") == self._start:
        return report
    return None

  def _read_reports(self) -> dict[int, dict | None]:
    """Reads the reports of other processes. Processes other than 0 read only process 0's report."""
    mine, count = jax.process_index(), jax.process_count()
    others = [i for i in range(count if mine == 0 else 1) if i != mine]
    with futures.ThreadPoolExecutor(READERS) as pool:
      return dict(zip(others, pool.map(self._read_report, others)))

  def _give_up(self, idle: float) -> None:
    mine = self._report(idle)
    lines = [
      f"error: no progress for {idle / 60:.3g} minutes (train.hang_minutes): process "
      f"{mine['process']} of {jax.process_count()} on {mine['host']} is at {place(mine)}. "
      "Its threads:",
      stacks(),
    ]
    if jax.process_count() > 1:
      lines += self._compare(mine)
    lines.append(f"error: the job ends with exit code {HUNG}: the same command continues it.")
    print("\n".join(lines), file=sys.stderr, flush=True)
    sys.stdout.flush()
    if jax.process_count() > 1:  # If another process exits, the loop fails, which ends this wait.
      self._stop.wait(LINGER_SECONDS * (2 if mine["process"] == 0 else 1))
    self._end(HUNG)

  def _compare(self, mine: dict) -> list[str]:
    """Returns lines for the log about the processes for which this process waits."""
    found = _within(FILE_SECONDS, self._read_reports)
    if found is None:
      return [f"error: the reports in {self._folder} cannot be read."]
    sentence, behind = verdict({**found, mine["process"]: mine})
    if mine["process"] and not behind:
      return ["error: the log of process 0 says which process has not arrived."]
    lines = [f"error: {sentence}."]
    for i in behind:
      if report := found.get(i):
        lines += [f"Threads of process {i}:", report["stacks"]]
    return lines


def stacks() -> str:
  """Returns the stacks of all threads of this process, innermost call first."""
  with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()


def _within(seconds: float, function: Callable[[], T]) -> T | None:
  """Returns the result of `function`, or None if it fails or takes longer than `seconds`."""
  found: list[T] = []

  def call() -> None:
    with contextlib.suppress(Exception):
      found.append(function())

  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(seconds)
  return found[0] if found else None
