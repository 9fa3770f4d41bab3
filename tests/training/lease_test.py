"""Two jobs never train in one folder, and a job that was killed keeps no other one out for long."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.training import lease
from cm3leon_jax.training.lease import Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
  monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1.0)


def hold(folder, beats=1, **holder):
  about = {"token": "other", "beats": beats, "host": "elsewhere", "pid": 7, **holder}
  partial = folder / "partial"
  partial.write_text(json.dumps(about))
  partial.replace(folder / lease.NAME)


def wait_until(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_lease_lives_as_long_as_its_job(tmp_path):
  with Lease(tmp_path / "run") as held:
    path = tmp_path / "run" / lease.NAME
    first = json.loads(path.read_text())
    assert (first["host"], first["pid"]) == (socket.gethostname(), os.getpid())
    wait_until(lambda: json.loads(path.read_text())["beats"] > first["beats"] + 1)
    assert held.guard(lambda x: x + 1)(1) == 2
  assert not path.exists()
  with pytest.raises(ZeroDivisionError), Lease(tmp_path / "run"):
    raise ZeroDivisionError
  assert not path.exists()


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
    with pytest.raises(UserError, match=r"^process 7 on elsewhere trains in "), Lease(tmp_path):
      pass
  finally:
    stop.set()
    thread.join()
  assert json.loads((tmp_path / lease.NAME).read_text())["token"] == "other"


def test_a_silent_holder_loses_its_lease(tmp_path, capsys):
  hold(tmp_path)
  start = time.monotonic()
  with Lease(tmp_path):
    assert time.monotonic() - start >= 1
    assert json.loads((tmp_path / lease.NAME).read_text())["token"] != "other"
  assert "process 7 on elsewhere gave none for 1 s" in capsys.readouterr().out


def gone() -> dict:
  child = subprocess.Popen([sys.executable, "-c", ""])
  child.wait()
  return {"host": socket.gethostname(), "pid": child.pid}


@pytest.mark.parametrize("content", ["gone", "restarted", b"", b"{", b"\x00\xff", b"[]"])
def test_no_job_waits_for_one_that_is_gone(tmp_path, monkeypatch, content):
  """`restarted`: a container whose process has the same number again."""
  monkeypatch.setattr(lease, "EXPIRE_SECONDS", 60.0)
  if isinstance(content, bytes):
    (tmp_path / lease.NAME).write_bytes(content)
  else:
    same = {"host": socket.gethostname(), "pid": os.getpid()}
    hold(tmp_path, **(gone() if content == "gone" else same))
  start = time.monotonic()
  with Lease(tmp_path):
    assert time.monotonic() - start < 10


def test_a_live_process_of_this_machine_is_waited_for(tmp_path):
  hold(tmp_path, host=socket.gethostname(), pid=os.getppid())
  start = time.monotonic()
  with Lease(tmp_path):
    assert time.monotonic() - start >= 1


def test_a_job_stops_when_another_one_has_taken_its_lease(tmp_path):
  with Lease(tmp_path) as held:
    step = held.guard(lambda: None)
    step()
    hold(tmp_path)

    def stopped():
      try:
        step()
      except UserError as error:
        return str(error).startswith("process 7 on elsewhere took ")
      return False

    wait_until(stopped)
  assert json.loads((tmp_path / lease.NAME).read_text())["token"] == "other"  # It is not ours.
