"""Tests that two jobs never train in one folder, and that a killed job blocks it only briefly."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.training.faults import lease
from cm3leon_jax.training.faults.lease import Lease
from tests.refusals import refused


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
  monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.5)


def hold(folder, beats=1, **holder):
  about = {"token": "other", "beats": beats, "host": "elsewhere", "pid": 7, **holder}
  partial = folder / "partial"
  partial.write_text(json.dumps(about))
  partial.replace(folder / lease.NAME)


def gone() -> dict:
  child = subprocess.Popen([sys.executable, "-c", ""])
  child.wait()
  return {**lease._this_process(), "pid": child.pid}


def wait_until(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def refusal(held, kind) -> Exception:
  """Waits until the lease stops the next step with an error; returns the error."""
  with pytest.raises(kind) as error:
    wait_until(lambda: held.ready(2))
  return error.value


def test_a_lease_lives_as_long_as_its_job(tmp_path):
  with Lease(tmp_path / "run") as held:
    path = tmp_path / "run" / lease.NAME
    first = json.loads(path.read_text())
    assert (first["host"], first["pid"]) == (socket.gethostname(), os.getpid())
    wait_until(lambda: json.loads(path.read_text())["beats"] > first["beats"] + 1)
    held.ready(1)
  assert not path.exists()
  with pytest.raises(ZeroDivisionError), Lease(tmp_path / "run"):
    raise ZeroDivisionError
  assert not path.exists()


def test_a_folder_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "write_json", mock.Mock(side_effect=OSError("Input/output error")))
  with refused(TryAgain, lease.NAME, "Input/output error"), Lease(tmp_path):
    pass


def test_a_folder_in_which_another_job_trains_is_refused(tmp_path):
  stop = threading.Event()

  def live():
    beats = 0
    while not stop.wait(0.05):
      beats += 1
      hold(tmp_path, beats)

  hold(tmp_path)
  thread = threading.Thread(target=live)
  thread.start()
  try:
    with refused(UserError, "process 7 on elsewhere", str(tmp_path)), Lease(tmp_path):
      pass
  finally:
    stop.set()
    thread.join()
  assert json.loads((tmp_path / lease.NAME).read_text())["token"] == "other"


def test_a_silent_holder_loses_its_lease(tmp_path, capsys):
  hold(tmp_path)
  start = time.monotonic()
  with Lease(tmp_path):
    assert time.monotonic() - start >= 0.5
    assert json.loads((tmp_path / lease.NAME).read_text())["token"] != "other"
  assert "process 7 on elsewhere did not renew its lease for 0.5 s" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["gone", b"{", b"[]"])
def test_no_job_waits_for_one_that_is_gone(tmp_path, monkeypatch, content):
  monkeypatch.setattr(lease, "EXPIRE_SECONDS", 60.0)
  if isinstance(content, bytes):
    (tmp_path / lease.NAME).write_bytes(content)
  else:
    hold(tmp_path, **gone())
  start = time.monotonic()
  with Lease(tmp_path):
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
  "holder",
  [
    {"pid": os.getppid()},
    {**gone(), "namespace": "another container"},
    {"pid": "x"},
  ],
)
def test_a_process_that_may_live_is_waited_for(tmp_path, holder):
  hold(tmp_path, **{**lease._this_process(), **holder})
  start = time.monotonic()
  with Lease(tmp_path):
    assert time.monotonic() - start >= 0.5


def test_of_two_jobs_that_start_together_one_trains(tmp_path, monkeypatch):
  write = Lease._write

  def write_and_be_overwritten(self):
    write(self)
    hold(tmp_path)

  monkeypatch.setattr(Lease, "_write", write_and_be_overwritten)
  with refused(UserError, "process 7 on elsewhere", "same time"), Lease(tmp_path):
    pass
  assert json.loads((tmp_path / lease.NAME).read_text())["token"] == "other"


def test_a_job_that_cannot_renew_its_lease_stops_only_in_the_end(tmp_path, monkeypatch):
  renewals = []

  def fail(path, value):
    renewals.append(value)
    raise RuntimeError("the bucket is away")

  with Lease(tmp_path) as held:
    monkeypatch.setattr(lease, "write_json", fail)
    wait_until(lambda: len(renewals) > 2)
    held.ready(1)

    assert "could not be renewed for 0.5 s" in str(refusal(held, TryAgain))
    monkeypatch.undo()


def test_before_a_save_the_lease_is_read_again(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "BEAT_SECONDS", 60.0)
  monkeypatch.setattr(lease, "EXPIRE_SECONDS", 60.0)
  with Lease(tmp_path) as held:
    held.check()
    hold(tmp_path)
    held.check(now=False)
    with refused(UserError, "process 7 on elsewhere took"):
      held.check()


def test_a_job_stops_when_another_one_has_taken_its_lease(tmp_path):
  with Lease(tmp_path) as held:
    held.ready(1)
    hold(tmp_path)

    assert str(refusal(held, UserError)).startswith("process 7 on elsewhere took ")
  assert json.loads((tmp_path / lease.NAME).read_text())["token"] == "other"  # Of the other job.
