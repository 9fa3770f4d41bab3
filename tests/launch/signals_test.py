"""SIGTERM and Ctrl-C before the loop of launch.train lose nothing and show no traceback."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from cm3leon_jax.config import CTRL_C, INTERRUPTED
from cm3leon_jax.settings import settings_from_config
from tests.launch.stages_before import make_workdir
from tests.launch.tiny_config import get_config

ROOT = pathlib.Path(__file__).parents[2]


# Starts launch.train as in the foreground, where Ctrl-C is not ignored, wherever the tests run.
START = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, INTERRUPTED), (signal.SIGINT, CTRL_C)]
)
def test_a_signal_before_the_loop_says_that_nothing_was_to_be_saved(tmp_path, number, code):
  """It comes after the rows were planned, while the steps are compiled."""
  make_workdir(tmp_path, settings_from_config(get_config()))
  job = subprocess.Popen(
    [sys.executable, "-c", START, "--config=tests/launch/tiny_config.py", f"--workdir={tmp_path}"],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env={**os.environ, "PYTHONUNBUFFERED": "1"},
  )  # fmt: skip
  for line in job.stdout:
    if line.startswith("rows: "):
      break
  job.send_signal(number)
  output, errors = job.communicate(timeout=300)
  assert (job.returncode, errors) == (code, "")
  assert output.splitlines()[-1] == (
    "stopped outside of the training steps: nothing was to be saved; the same command continues."
  )
  assert not (tmp_path / "train" / "lease.json").exists()
  assert not (tmp_path / "train" / "done.json").exists()
