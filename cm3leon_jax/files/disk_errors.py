"""Explains disk errors in one sentence: the disk is full, or a file cannot be read or written."""

import errno
import logging
import os
import pathlib
import re
import sys

from absl import logging as absl_logging

from cm3leon_jax.config import UserError, causes

# No space left, quota exceeded, or file too large.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A file that these errors make unreadable may still exist and be intact.
NOT_READ = (
  errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
  errno.EROFS,
)  # fmt: skip


def _texts(numbers: tuple[int, ...]) -> str:
  return "|".join(re.escape(os.strerror(number)) for number in numbers)


_TEXT_OF_FULL = re.compile(_texts(FULL))
# Formats of TensorStore's and ArrayRecord's error messages.
_FORMATS = (
  re.compile(rf'local file "(?P<file>[^"]*)": .*?(?P<reason>{_texts(NOT_READ)})'),
  re.compile(rf"^\w+\(\) failed: (?P<reason>{_texts(NOT_READ)}); \w+ (?P<file>[^;]*)"),
)
_OF_LIBRARIES = (RuntimeError, ValueError, OSError)


def failure(error: Exception) -> str:
  """Returns what could not be read or written, and what to do; "" if `error` is not a disk error.

  failure(PermissionError(errno.EACCES, "Permission denied", "run/x"))
  "run/x could not be read or written (Permission denied): fix the disk or the permissions, ..."
  """
  if isinstance(error, UserError):
    return ""
  if reason := _full(error):
    return f"{reason}: free some disk space and run the same command again."
  if reason := _not_read(error):
    return f"{reason}: fix the disk or the permissions, and run the same command again."
  return ""


def _not_read(error: Exception) -> str:
  if isinstance(error, OSError) and error.errno in NOT_READ and error.filename:
    return f"{error.filename} could not be read or written ({error.strerror})"
  for pattern in _FORMATS if type(error) in _OF_LIBRARIES else ():
    if found := pattern.search(str(error)):
      return f"{found['file']} could not be read or written ({found['reason']})"
  return ""


def _full(error: BaseException | None) -> str:
  for found in causes(error):
    if isinstance(found, OSError) and found.errno in FULL:
      return f"{found.filename or 'a file'} could not be written ({os.strerror(found.errno)})"
    text = _TEXT_OF_FULL.search(str(found)) if type(found) in _OF_LIBRARIES else None
    if text:
      return f"a file could not be written ({text[0]})"
  return ""


def is_full(error: BaseException | None) -> bool:
  """Returns whether an error or one of its causes says that the disk is full."""
  return bool(_full(error))


def prepare_logging() -> None:
  """Hides Orbax's tracebacks about a full disk, and the errors that follow from them."""
  for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
    logger.addFilter(is_logged)
  sys.unraisablehook = print_unraisable


def is_logged(record: logging.LogRecord) -> bool:
  """Returns False for log records of Orbax or asyncio whose error is a full disk."""
  of_orbax = not {"orbax", "asyncio"}.isdisjoint(pathlib.PurePath(record.pathname).parts)
  return not (of_orbax and record.exc_info and is_full(record.exc_info[1]))


def print_unraisable(found: "sys.UnraisableHookArgs") -> None:
  """Prints an error that cannot be caught, unless TensorStore reports it to a closed event loop.

  Orbax closes the loop when an array cannot be written. Later writes then fail with errors that do
  not contain the reason.
  """
  caller = found.exc_traceback and found.exc_traceback.tb_frame.f_code.co_name
  if caller != "call_soon_threadsafe" or str(found.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(found)
