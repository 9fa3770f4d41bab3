"""A lease on the folder of a run, so that two jobs never train in one workdir."""

from collections.abc import Callable
import os
import secrets
import socket
import threading
import time

from etils import epath

from cm3leon_jax import distributed
from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json, write_json

NAME = "lease.json"
BEAT_SECONDS = 15.0
# A job without a sign of life for so long has lost its lease. Clocks of machines are not compared.
EXPIRE_SECONDS = 90.0


class Lease:
  """Holds a folder for this job while the body of a `with` runs; process 0 acts for all.

  lease.json names the job that holds it, and a number that grows with every sign of life. A job
  that finds the file waits until the number grows, and refuses to start, or until it has not grown
  for EXPIRE_SECONDS, and takes the lease. It does not wait for a process of its own machine that is
  gone.
  """

  def __init__(self, folder: epath.PathLike):
    self._folder = epath.Path(folder)
    self._token, self._beats, self._lost = secrets.token_hex(8), 0, ""
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

  def __enter__(self):
    """Takes the lease. Raises UserError if another job holds it."""
    with distributed.together():
      if distributed.is_first():
        self._wait_for_others()
        self._write()
        self._thread.start()
    return self

  def __exit__(self, *_):
    """Gives the lease back."""
    if self._thread.is_alive():
      self._stop.set()
      self._thread.join()
      if not self._lost:
        self._path.unlink(missing_ok=True)

  def guard(self, function: Callable) -> Callable:
    """Returns a function that raises UserError, from when another job has taken the lease."""

    def guarded(*args):
      if self._lost:
        raise UserError(
          f"{self._lost} took {self._path}, because this job gave no sign of life for "
          f"{EXPIRE_SECONDS:g} s: it stops, and the other one continues."
        )
      return function(*args)

    return guarded

  @property
  def _path(self) -> epath.Path:
    return self._folder / NAME

  def _write(self) -> None:
    self._beats += 1
    holder = {"host": socket.gethostname(), "pid": os.getpid()}
    write_json(self._path, {"token": self._token, "beats": self._beats, **holder})

  def _read(self) -> dict:
    """Returns what the file says; {} if there is none, or half a one."""
    try:
      found = read_json(self._path)
    except UserError:
      return {}
    return found if isinstance(found, dict) else {}

  def _wait_for_others(self) -> None:
    first = self._read()
    if not first or _is_gone(first):
      return
    print(f"train: {_name(first)} holds {self._path}; waiting for a sign of life.", flush=True)
    end = time.monotonic() + EXPIRE_SECONDS
    while time.monotonic() < end:
      time.sleep(min(1.0, EXPIRE_SECONDS / 10))
      now = self._read()
      if not now:
        return
      if now != first:
        raise UserError(
          f"{_name(now)} trains in {self._folder}: use another --workdir, or stop that job."
        )
    print(f"train: {_name(first)} gave none for {EXPIRE_SECONDS:g} s; its lease ends.", flush=True)

  def _beat(self) -> None:
    while not self._stop.wait(BEAT_SECONDS):
      try:
        found = self._read()
        if found and found.get("token") != self._token:
          self._lost = _name(found)
          return
        self._write()
      except OSError:  # Of a bucket or a network disk; the next beat may succeed.
        continue


def _name(holder: dict) -> str:
  return f"process {holder.get('pid')} on {holder.get('host')}"


def _is_gone(holder: dict) -> bool:
  """Returns whether the holder was a process of this machine that has ended."""
  pid = holder.get("pid")
  if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
    return False
  if pid == os.getpid():  # A container that was started again gives the same numbers.
    return True
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except OSError:
    return False
  return False
