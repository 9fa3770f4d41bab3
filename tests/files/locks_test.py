import errno
import fcntl
import threading
import time
from unittest import mock

import pytest

from cm3leon_jax.files import locks


@pytest.mark.parametrize("name", ["", "lock"])
def test_two_processes_in_one_folder_follow_each_other(tmp_path, capsys, name):
  running, order = threading.Event(), []

  def other():
    running.set()
    with locks.alone(tmp_path / name, "waits"):
      order.append("second")

  thread = threading.Thread(target=other)
  with locks.alone(tmp_path / name):
    thread.start()
    running.wait()
    time.sleep(0.2)
    order.append("first")
  thread.join(timeout=60)
  assert order == ["first", "second"]
  assert capsys.readouterr().out == "waits\n"


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(tmp_path, monkeypatch):
  error = OSError(errno.EBADF, "what NFS says of a folder")
  monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=error))
  with locks.alone(tmp_path):
    (tmp_path / "written").touch()
