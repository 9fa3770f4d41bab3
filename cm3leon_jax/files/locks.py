"""Lets one process at a time work in a folder."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os

from etils import epath


@contextlib.contextmanager
def alone(path: epath.PathLike, message: str = "") -> Iterator[None]:
  """Locks a local folder or file, after waiting for other processes.

  A file is created if it does not exist. Prints `message` if it has to wait. Nothing is locked in a
  bucket, nor a folder on NFS, which only locks files that are open for writing.
  """
  if "://" in os.fspath(path):
    yield
    return
  handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT, 0o600)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if message:
        print(message, flush=True)
      fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
      if error.errno != errno.EBADF:
        raise
    yield
  finally:
    os.close(handle)  # This also ends the lock.
