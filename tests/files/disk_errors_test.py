"""Tests that a full disk causes a one-sentence message, and other errors keep their traceback."""

import asyncio
import errno
import logging
import sys
import types

import pytest

from cm3leon_jax.config import UserError, causes
from cm3leon_jax.files.disk_errors import failure, is_full, is_logged, prepare_logging

WRITING = 'OUT_OF_RANGE: Failed writing: "/a/d/756ac1": Failed to write 35 bytes to file 5: '


def caused(error: Exception) -> Exception:
  """Returns a RuntimeError whose cause is `error`."""
  try:
    try:
      raise error
    except Exception as cause:
      raise RuntimeError("a thread failed") from cause
  except RuntimeError as found:
    return found


def record_of(error: Exception | None, path: str) -> logging.LogRecord:
  exc_info = (type(error), error, None) if error else None
  return logging.LogRecord("absl", logging.ERROR, path, 1, "failed", None, exc_info)


@pytest.mark.parametrize(
  ("error", "full"),
  [
    (OSError(errno.ENOSPC, "No space left on device"), True),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
    (ValueError(f"{WRITING}No space left on device [os_error_code='28']"), True),
    (ValueError(f"{WRITING}File too large [os_error_code='27']"), True),
    (ValueError("File too large [tensorstore_spec='{}', os_error_code='27']"), True),
    (OSError(errno.EIO, "Input/output error"), False),
    (ValueError(f"{WRITING}Input/output error [os_error_code='5']"), False),
    (ValueError("28"), False),
  ],
)
def test_the_tracebacks_of_a_full_disk_alone_are_left_out(error, full):
  for found in (error, caused(error)):
    assert is_full(found) is full
    assert is_logged(record_of(found, "/lib/orbax/checkpoint/future.py")) is not full
    assert is_logged(record_of(found, "/lib/asyncio/base_events.py")) is not full
    assert is_logged(record_of(found, "/lib/cm3leon_jax/serving/engine.py"))
  assert is_logged(record_of(None, "/lib/orbax/checkpoint/future.py"))


def circle() -> Exception:
  first, second = ValueError("first"), ValueError("second")
  first.__cause__, second.__cause__ = second, first
  return first


def test_errors_that_led_to_one_another_come_once():
  """Lists two errors that cause each other only once; Orbax raises them without permissions."""
  assert [str(error) for error in causes(circle())] == ["first", "second"]
  assert not is_full(circle())


def test_the_members_of_a_group_are_causes():
  full = OSError(errno.ENOSPC, "No space left on device")
  assert is_full(ExceptionGroup("writes", [ValueError("a"), full]))
  assert not is_full(ExceptionGroup("writes", [ValueError("a")]))


@pytest.mark.parametrize(
  ("error", "sentence"),
  [
    (OSError(errno.ENOSPC, "x", "w/a"), "w/a could not be written (No space left on device)"),
    (OSError(errno.EDQUOT, "x"), "a file could not be written (Disk quota exceeded)"),
    (
      RuntimeError("Write() failed: File too large; writing w/a"),
      "a file could not be written (File too large)",
    ),
    (caused(OSError(errno.ENOSPC, "x")), "a file could not be written (No space left on device)"),
  ],
)
def test_a_full_disk_is_one_sentence(error, sentence):
  assert failure(error) == f"{sentence}: free some disk space and run the same command again."


def test_what_a_user_is_told_already_stays():
  assert failure(UserError("No space left on device")) == ""
  assert failure(KeyError("No space left on device")) == ""


def test_a_write_that_ends_after_the_first_error_prints_nothing(monkeypatch):
  loop = asyncio.new_event_loop()
  loop.close()
  try:
    loop.call_soon_threadsafe(print)
  except RuntimeError as error:
    late, from_here = error, error.__traceback__

  printed = []
  monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  prepare_logging()
  print_unraisable = sys.unraisablehook
  print_unraisable(types.SimpleNamespace(exc_value=late, exc_traceback=from_here.tb_next))
  assert printed == []  # Hidden: TensorStore reported to a closed event loop.
  others = [
    types.SimpleNamespace(exc_value=late, exc_traceback=from_here),
    types.SimpleNamespace(exc_value=OSError(errno.EIO, "Input/output"), exc_traceback=None),
    types.SimpleNamespace(exc_value=ValueError("a"), exc_traceback=from_here.tb_next),
  ]
  for found in others:
    print_unraisable(found)
  assert printed == others
