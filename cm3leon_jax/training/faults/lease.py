"""A lease on the folder of a stage, so that two jobs do not work in one folder."""

import contextlib
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any

from etils import epath

from cm3leon_jax import distributed
from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.files import buckets
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.training.hooks import Hook

NAME = "lease.json"
BEAT_SECONDS = 15.0
# A job without a sign of life for so long has lost its lease. Clocks of machines are not compared.
EXPIRE_SECONDS = 90.0
POLL_SECONDS = 1.0  # Between two looks at the lease of another job.
SETTLE_SECONDS = 0.2  # After which a job reads whether one that started with it has the lease.


class Lease(Hook):
  """Holds a folder for this job while the body of a `with` runs; process 0 acts for all.

  lease.json names the job that holds it, and a number that grows with every sign of life. A job
  that finds the file waits until the number grows, and refuses to start, or until it has not grown
  for EXPIRE_SECONDS, and takes the lease. It does not wait for a process of its own machine that is
  gone. A job whose lease was taken, or that could not renew it for so long, stops at its next step.
  """

  def __init__(self, folder: epath.PathLike):
    self._folder = epath.Path(folder)
    self._token, self._beats, self._lost = secrets.token_hex(8), 0, ""
    self._renewed = 0.0
    self._stop, self._renewing = threading.Event(), threading.Lock()
    self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

  def __enter__(self) -> "Lease":
    """Takes the lease.

    Raises:
      UserError: another job holds it, or this account may not write to the bucket.
      TryAgain: the file cannot be read or written.
    """
    try:
      with distributed.together():
        if distributed.is_first():
          self._start()
    except BaseException:  # Also the exit of a job that was asked to stop.
      self.__exit__()
      raise
    return self

  def _start(self) -> None:
    try:
      self._take()
    except OSError as error:
      kind = UserError if buckets.refuses(error) else TryAgain
      raise kind(f"{self._path} cannot be read or written ({error}).") from error
    self._thread.start()

  def __exit__(self, *_: object) -> None:
    """Gives the lease back."""
    if not self._beats:  # This process has not written it.
      return
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()
    with contextlib.suppress(Exception):  # Of a bucket, of any kind: the first error counts.
      if self._read().get("token") == self._token:
        self._path.unlink(missing_ok=True)

  def check(self, now: bool = True) -> None:
    """Checks that the lease is still held.

    Args:
      now: whether to read the file; else the last sign of life counts, if it is recent.

    Raises:
      UserError: another job has taken it.
      TryAgain: it could not be renewed.
    """
    if not self._thread.is_alive():
      return
    if now or time.monotonic() - self._renewed > EXPIRE_SECONDS:
      self._renew()
    if self._lost:
      raise UserError(
        f"{self._lost} took {self._path}, because this job gave no sign of life for "
        f"{EXPIRE_SECONDS:g} s: it stops, and the other one continues."
      )
    if time.monotonic() - self._renewed > EXPIRE_SECONDS:
      raise TryAgain(f"{self._path} could not be renewed for {EXPIRE_SECONDS:g} s.")

  def ready(self, step: int) -> None:
    """See `Hook`. Raises as `check` does."""
    self.check(now=False)

  @property
  def _path(self) -> epath.Path:
    return self._folder / NAME

  def _write(self) -> None:
    self._beats += 1
    write_json(self._path, {"token": self._token, "beats": self._beats, **_this_process()})
    self._renewed = time.monotonic()

  def _read(self) -> dict:
    """Returns what the file says; {} if there is none, or an incomplete one."""
    try:
      found = read_json(self._path)
    except UserError:
      return {}
    return found if isinstance(found, dict) else {}

  def _take(self) -> None:
    first = self._read()
    if first and not _is_gone(first):
      self._wait_for(first)
    self._write()
    time.sleep(SETTLE_SECONDS)
    if (found := self._read()).get("token") != self._token:
      raise UserError(f"{_name(found)} works in {self._folder}: it started at the same time.")

  def _wait_for(self, first: dict) -> None:
    print(f"{_name(first)} holds {self._path}; waiting for a sign of life.", flush=True)
    end = time.monotonic() + EXPIRE_SECONDS
    while time.monotonic() < end:
      time.sleep(min(POLL_SECONDS, EXPIRE_SECONDS / 10))
      now = self._read()
      if not now:
        return
      if now != first:
        raise UserError(
          f"{_name(now)} works in {self._folder}: use another --workdir, or stop that job."
        )
    print(f"{_name(first)} gave no sign for {EXPIRE_SECONDS:g} s; its lease ends.", flush=True)

  def _beat(self) -> None:
    while not self._stop.wait(BEAT_SECONDS):
      self._renew()

  def _renew(self) -> None:
    try:
      with self._renewing:
        found = self._read()
        if found and found.get("token") != self._token:
          self._lost = _name(found)
        elif not self._lost:
          self._write()
    except Exception:  # Of a bucket or a network disk, of any kind; the next beat may succeed.
      return


def _name(holder: dict) -> str:
  return f"process {holder.get('pid')} on {holder.get('host')}"


def _this_process() -> dict:
  """Names this process among those of all machines and containers.

  Containers with one hostname have processes of their own, and so have machines, whose namespaces
  outside of containers have one id: a boot of a machine has an id that no other has.
  """
  namespace, boot = "", ""
  with contextlib.suppress(OSError):
    namespace = os.readlink("/proc/self/ns/pid")
  with contextlib.suppress(OSError):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  return {"host": socket.gethostname(), "boot": boot, "namespace": namespace, "pid": os.getpid()}


def _is_gone(holder: dict) -> bool:
  """Returns whether the holder was a process of this machine, or container, that has ended."""
  here = _this_process()
  pid: Any = holder.get("pid")
  if any(holder.get(name) != here[name] for name in ("host", "boot", "namespace")):
    return False
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return True
  except (OSError, OverflowError, TypeError, ValueError):
    return False
  return False
