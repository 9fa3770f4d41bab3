"""A full disk: one sentence says what to do, without what Orbax prints before it."""

import errno
import logging
import pathlib
import re
import sys

from absl import logging as absl_logging

# No space, a quota, or a limit on the size of files.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_TENSORSTORE = re.compile(rf"os_error_code='({'|'.join(map(str, FULL))})'")


def is_full(error: BaseException | None) -> bool:
  """Returns whether an error, or one that led to it, says that the disk is full."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in FULL:
      return True
    if _OF_TENSORSTORE.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def prepare_logging() -> None:
  """Leaves out tracebacks of Orbax about a full disk, and what its other writes then print."""
  for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
    logger.addFilter(is_logged)
  sys.unraisablehook = print_unraisable


def is_logged(record: logging.LogRecord) -> bool:
  """Filters a logger: leaves out what Orbax and its tasks log with the error of a full disk."""
  of_orbax = not {"orbax", "asyncio"}.isdisjoint(pathlib.PurePath(record.pathname).parts)
  return not (of_orbax and record.exc_info and is_full(record.exc_info[1]))


def print_unraisable(found) -> None:
  """Prints an error that nobody can catch, unless TensorStore reports to a closed event loop.

  After the first array that cannot be written Orbax closes the loop, and the writes of the others
  end later. They say nothing about the reason; the first error does.
  """
  caller = found.exc_traceback and found.exc_traceback.tb_frame.f_code.co_name
  if caller != "call_soon_threadsafe" or str(found.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(found)
