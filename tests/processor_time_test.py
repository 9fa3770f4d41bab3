"""Tests the measurement of CPU time in separate pytest sessions."""

import os
import re
import subprocess
import sys

import pytest

from tests import launched

BUSY = """
import subprocess, sys, time
import pytest
def burn(seconds):
  end = time.process_time() + seconds
  while time.process_time() < end:
    pass
@pytest.fixture(scope="module")
def dear():
  burn(1.0)
def test_shared(dear):
  pass
def test_busy():
  burn(0.6)
def test_child():
  code = "import time\\nwhile time.process_time() < 0.8: pass"
  subprocess.run([sys.executable, "-c", code], check=True)
def test_asleep():
  time.sleep(0.6)
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
  folder = tmp_path_factory.mktemp("busy")
  (folder / "busy_test.py").write_text(BUSY)
  command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.processor_time", "-c", os.devnull]

  def run(*flags):
    environment = {**os.environ, "PYTHONPATH": os.fspath(launched.ROOT)}
    result = subprocess.run(
      [*command, f"--rootdir={folder}", *flags, os.fspath(folder / "busy_test.py")],
      env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout

  return run


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_test_over_the_limit_fails_the_session(session, processes):
  code, text = session("-n", processes, "--warn-seconds=0.4", "--fail-seconds=0.5")
  assert "4 passed" in text
  assert code == 1
  rows = re.findall(r"  +([\d.]+)  .*busy_test.py::(\w+)", text)
  named = {name: float(seconds) for seconds, name in rows}
  assert named.keys() == {"dear", "test_busy", "test_child"}
  assert named["dear"] >= 1.0
  assert named["test_busy"] >= 0.6
  assert named["test_child"] >= 0.8


@pytest.mark.slow
def test_without_a_limit_seconds_are_only_printed(session):
  code, text = session("-n", "0", "--warn-seconds=0.4")
  assert code == 0
  assert "many: " in text
  assert "too many" not in text
