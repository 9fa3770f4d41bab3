"""Progress of long work: a bar in a terminal, a line now and then in a log."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

SECONDS = 30  # Between two lines of a log.


class _Lines:
  """Writes each state of a bar as a line of its own: a log has no carriage return."""

  encoding = "ascii"

  def __init__(self, stream: TextIO) -> None:
    self._stream = stream

  def write(self, text: str) -> None:
    if line := text.strip():
      self._stream.write(f"{line}\n")

  def flush(self) -> None:
    self._stream.flush()


def is_interactive() -> bool:
  """Returns whether stderr is a terminal or a cell of a notebook."""
  return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")


def progress_bar(*args: Any, **options: Any) -> tqdm:
  """Returns a tqdm bar on stderr, with the arguments of tqdm.

  In a terminal or notebook it is redrawn every second. Elsewhere (a file, a pipe, the log of a pod)
  it prints its state as a line at the start, every `SECONDS` and at the end; with leave=False, only
  if the work takes longer than `SECONDS`.
  """
  if is_interactive():
    return tqdm(*args, mininterval=1, **options)
  if not options.get("leave", True):
    options["delay"] = SECONDS  # A bar of a part, which is gone when the part is done.
  lines = {"file": _Lines(sys.stderr), "mininterval": SECONDS, "maxinterval": SECONDS}
  return tqdm(*args, **lines, **options)
