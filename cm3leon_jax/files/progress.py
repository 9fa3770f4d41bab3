"""Shows progress as a bar in a terminal, and as occasional lines in a log."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

SECONDS = 30  # Seconds between two lines in a log.
BAR = "{l_bar}{bar:20}{r_bar}"  # Of a line in a log.


class _Lines:
  """Writes each state of a bar as a separate line, because logs ignore carriage returns."""

  encoding = "ascii"

  def __init__(self, stream: TextIO) -> None:
    self._stream = stream

  def write(self, text: str) -> None:
    if line := text.strip():
      self._stream.write(f"{line}\n")

  def flush(self) -> None:
    self._stream.flush()


def is_interactive() -> bool:
  """Returns whether stderr is a terminal or a notebook cell."""
  return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")


def progress_bar(*args: Any, **options: Any) -> tqdm:
  """Returns a tqdm bar on stderr. Takes the arguments of tqdm.

  In a terminal or notebook the bar is redrawn every second. Elsewhere (a file, a pipe, the log of
  a pod) it prints a line at the start, every `SECONDS` and at the end. With
  leave=False, it prints lines only if the work takes longer than `SECONDS`.
  """
  if is_interactive():
    return tqdm(*args, mininterval=1, **options)
  if not options.get("leave", True):
    options["delay"] = SECONDS  # leave=False is for bars of short parts of the work.
  lines = {"file": _Lines(sys.stderr), "mininterval": SECONDS, "maxinterval": SECONDS}
  # The position 0 keeps tqdm from moving the cursor for nested bars.
  return tqdm(*args, **lines, ascii=True, bar_format=BAR, position=0, **options)
