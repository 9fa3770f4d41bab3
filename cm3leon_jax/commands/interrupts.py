"""Ends a command at Ctrl-C or SIGTERM, even if the exception of the signal handler is lost.

Python drops an exception that a handler raises in a callback of the garbage collector, such as
JAX's, and calls no handler while native code runs, such as XLA's compiler. So a thread also reads
each signal, and ends a process that has not ended in time.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from cm3leon_jax.errors import CTRL_C, INTERRUPTED, STOPPED_EARLY

INTERRUPTION = "error: interrupted by Ctrl-C; finished stages and checkpoints are kept.\n"
_called: dict[int, Any] = {}  # Signal -> our handler that Python has called for it.
CODES = {signal.SIGINT: CTRL_C, signal.SIGTERM: INTERRUPTED}


def stop_early(number: int, _: FrameType | None) -> NoReturn:
  """Handles a signal before the training loop: ends the command. The loop uses `StopSignal`."""
  _called[number] = stop_early
  # A handler must not print: it may have interrupted a print.
  os.write(1, f"{STOPPED_EARLY}\n".encode())
  sys.exit(CODES[signal.Signals(number)])


def interrupt(number: int, frame: FrameType | None) -> None:
  """Handles Ctrl-C like Python, but during an import it ends the process.

  Native code that is being loaded may crash if an exception is raised in it.
  """
  _called[number] = interrupt
  while frame:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      end()
    frame = frame.f_back
  raise KeyboardInterrupt


# Handler -> seconds in which its exception must end the process. A save may be in progress.
SECONDS: dict[Any, float] = {interrupt: 1.5, stop_early: 300.0}


def listen() -> None:
  """Handles Ctrl-C, and starts the thread, which ignores signals that have another handler."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=_hear, args=(reading,), name="interrupts", daemon=True).start()


def _hear(reading: int) -> None:
  while True:
    number = signal.Signals(os.read(reading, 1)[0])
    time.sleep(0.1)  # Python calls the handler at about the same time, unless native code runs.
    handler = _called.pop(number, None) or signal.getsignal(number)
    for _ in range(round(10 * SECONDS.get(handler, 0))):
      time.sleep(0.1)
      if signal.getsignal(number) is not handler:  # The exception was lost, and a loop began.
        os.kill(os.getpid(), number)
        break
    else:
      if handler in SECONDS:
        end(CODES[number], "" if handler is stop_early else INTERRUPTION)


def end(code: int = CTRL_C, sentence: str = INTERRUPTION) -> NoReturn:
  """Ends the process without waiting for its threads, which could crash while Python exits."""
  sys.stdout.flush()
  sys.stderr.write(sentence)
  sys.stderr.flush()
  os._exit(code)
