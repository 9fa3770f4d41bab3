"""Ends a command without waiting for threads that would crash or never end."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from absl import app

from cm3leon_jax.config import CTRL_C

if TYPE_CHECKING:
  from collections.abc import Callable


def run_app(main: Callable[[list[str]], None], parse: Callable[[list[str]], list[str]]) -> None:
  """Runs an absl app. Reports Ctrl-C in one sentence, and does not wait for Orbax's threads."""
  try:
    app.run(main, flags_parser=parse)
  except KeyboardInterrupt:
    print(
      "error: interrupted by Ctrl-C; finished stages and checkpoints are kept.", file=sys.stderr
    )
    _end_at_once(CTRL_C)  # XLA may still run, and its threads would crash while Python exits.
  except SystemExit as end:
    # If a save fails at its start, Orbax's threads wait ten minutes for signals that never arrive.
    if (
      isinstance(end.code, int)
      and end.code
      and any(type(t).__module__.startswith("orbax.") for t in threading.enumerate())
    ):
      _end_at_once(end.code)
    raise


def _end_at_once(code: int) -> NoReturn:
  """Ends the process without waiting for its threads."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
