"""Ends a command at Ctrl-C or SIGTERM."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from cm3leon_jax.config import CTRL_C, INTERRUPTED, STOPPED_EARLY

INTERRUPTION = "error: interrupted by Ctrl-C; finished stages and checkpoints are kept.\n"


def stop_early(number: int, _: FrameType | None) -> NoReturn:
  """Handles a signal before the training loop: ends the command. The loop uses `StopSignal`."""
  # A handler must not print: it may have interrupted a print.
  os.write(1, f"{STOPPED_EARLY}\n".encode())
  sys.exit(CTRL_C if number == signal.SIGINT else INTERRUPTED)


def end(code: int = CTRL_C, sentence: str = INTERRUPTION) -> NoReturn:
  """Ends the process without waiting for its threads, which could crash while Python exits."""
  sys.stdout.flush()
  sys.stderr.write(sentence)
  sys.stderr.flush()
  os._exit(code)
