"""Leases the folder of a stage to one job, so that two jobs do not write to the same folder."""

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
from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.training.loop import Hook

NAME = "lease.json"
BEAT_SECONDS = 15.0
# A lease expires after this time without a heartbeat, measured by the clock of the waiting job.
EXPIRE_SECONDS = 90.0
POLL_SECONDS = 1.0  # Seconds between two reads of another job's lease.
# Seconds after which a job reads its new lease again, in case another job took it simultaneously.
SETTLE_SECONDS = 0.2


class Lease(Hook):
  """Reserves a folder for this job inside a `with` block. Process 0 acts for all processes.

  lease.json contains the id of the job that has the lease, and a counter that grows with every
  heartbeat. Another job that finds this file reads it repeatedly. If the counter grows, the other
  job refuses to start. If the counter does not grow for EXPIRE_SECONDS, or if the lease belongs to
  a process of the same machine that has ended, the other job takes the lease. A job that has lost
  its lease, or could not renew it for EXPIRE_SECONDS, stops before its next step.
  """

  def __init__(self, folder: epath.PathLike):
    self._folder = epath.Path(folder)
    self._path = self._folder / NAME
    self._token, self._beats, self._lost = secrets.token_hex(8), 0, ""
    self._renewed = 0.0
    self._stop, self._renewing = threading.Event(), threading.Lock()
    self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

  def __enter__(self) -> "Lease":
    """Takes the lease.

    Raises:
      UserError: another job has the lease, or this account cannot write to the GCS bucket.
      TryAgain: lease.json cannot be read or written.
    """
    try:
      with distributed.together():
        if distributed.is_first():
          self._start()
    except BaseException:  # Includes the SystemExit that a signal causes.
      self.__exit__()
      raise
    return self

  def _start(self) -> None:
    try:
      first = self._read()
      if first and not _is_gone(first):
        self._wait_for(first)
      self._write()
      time.sleep(SETTLE_SECONDS)
      result = self._read()
    except OSError as error:
      raise TryAgain(f"{self._path} cannot be read or written ({error}).") from error
    if result.get("token") != self._token:
      raise UserError(f"{_name(result)} works in {self._folder}: it started at the same time.")
    self._thread.start()

  def __exit__(self, *_: object) -> None:
    if not self._beats:  # This process has not written lease.json.
      return
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join()
    # A GCS bucket may raise any error here. It must not hide an error of the `with` block.
    with contextlib.suppress(Exception):
      if self._read().get("token") == self._token:
        self._path.unlink(missing_ok=True)

  def check(self, now: bool = True) -> None:
    """Checks that this job still has the lease.

    If `now` is False, lease.json is read only if the last heartbeat is older than EXPIRE_SECONDS.

    Raises:
      UserError: another job has taken the lease.
      TryAgain: the lease could not be renewed.
    """
    if not self._thread.is_alive():
      return
    if now or time.monotonic() - self._renewed > EXPIRE_SECONDS:
      self._renew()
    if self._lost:
      raise UserError(
        f"{self._lost} took {self._path}, because this job did not renew it for "
        f"{EXPIRE_SECONDS:g} s: this job stops, and the other job continues."
      )
    if time.monotonic() - self._renewed > EXPIRE_SECONDS:
      raise TryAgain(f"{self._path} could not be renewed for {EXPIRE_SECONDS:g} s.")

  def ready(self, step: int) -> None:
    """See `Hook`. Raises the errors of `check`."""
    self.check(now=False)

  def _write(self) -> None:
    self._beats += 1
    write_json(self._path, {"token": self._token, "beats": self._beats, **_this_process()})
    self._renewed = time.monotonic()

  def _read(self) -> dict:
    """Returns the content of lease.json, or {} if the file is missing or incomplete."""
    try:
      result = read_json(self._path)
    except UserError:
      return {}
    return result if isinstance(result, dict) else {}

  def _wait_for(self, first: dict) -> None:
    print(
      f"{_name(first)} holds {self._path}; waiting to see whether it renews this lease.", flush=True
    )
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
    print(f"{_name(first)} did not renew its lease for {EXPIRE_SECONDS:g} s.", flush=True)

  def _beat(self) -> None:
    while not self._stop.wait(BEAT_SECONDS):
      self._renew()

  def _renew(self) -> None:
    try:
      with self._renewing:
        result = self._read()
        if result and result.get("token") != self._token:
          self._lost = _name(result)
        elif not self._lost:
          self._write()
    except Exception:  # GCS or a network disk may raise any error. The next heartbeat retries.
      return


def _name(holder: dict) -> str:
  return f"process {holder.get('pid')} on {holder.get('host')}"


def _this_process() -> dict:
  """Identifies this process among the processes of all machines and containers.

  Containers with the same hostname count their process ids separately, so the id includes the pid
  namespace. Outside of containers, this namespace is the same on all machines, so the id also
  includes the boot id of the machine.
  """
  namespace, boot = "", ""
  with contextlib.suppress(OSError):
    namespace = os.readlink("/proc/self/ns/pid")
  with contextlib.suppress(OSError):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  return {"host": socket.gethostname(), "boot": boot, "namespace": namespace, "pid": os.getpid()}


def _is_gone(holder: dict) -> bool:
  """Returns whether a lease belongs to a process of this machine or container that has ended."""
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
