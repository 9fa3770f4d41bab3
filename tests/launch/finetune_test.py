"""Interrupts `CM3Leon.finetune` by Ctrl-C, and continues it by the same call."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.evidence import finetune
from tests.launched import ROOT

SCRIPT = """
from cm3leon_jax import CM3Leon

fields = {"train.steps": 60, "train.checkpoint_every": 20, "train.patience": 0}
model = CM3Leon.finetune("drawings", "tuned", minutes=1, max_forgetting=9, fields=fields)
print("loaded step", model.step)
"""
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}


def start(folder):
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT], cwd=folder, text=True, env=ENVIRONMENT,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def wait_for(log: pathlib.Path, text: str, seconds: float = 900) -> None:
  end = time.monotonic() + seconds
  while not (log.exists() and text in log.read_text()):
    assert time.monotonic() < end, f"{log} never had {text!r}"
    time.sleep(1)


@pytest.mark.slow
def test_a_tuning_stopped_by_ctrl_c_keeps_its_checkpoint_and_continues(tmp_path):
  finetune.make(tmp_path / "drawings")
  log = tmp_path / "tuned" / "logs" / "train.log"
  process = start(tmp_path)
  wait_for(log, "step 0/60")
  time.sleep(5)
  process.send_signal(signal.SIGINT)
  printed = process.communicate(timeout=300)[0]
  assert process.returncode != 0
  assert "KeyboardInterrupt" in printed
  stopped = re.search(r"stopped at step (\d+) of 60; saved in", log.read_text())
  assert stopped, log.read_text()
  again = start(tmp_path)
  printed = again.communicate(timeout=1_500)[0]
  assert again.returncode == 0, printed
  assert "loaded step 60" in printed
  assert re.search(r"forgetting: 200 held-out documents of scenes", printed)
  assert (
    f'"from_step": {stopped[1]}' in (log.parents[1] / "train/metrics/metrics.jsonl").read_text()
  )
