import importlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from etils import epath
import numpy as np
import pytest

from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import CTRL_C, INTERRUPTED
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.stages import stages
from tests.data.raw_folder import write_raw
from tests.launch import small_config
from tests.launch.stages_before import make_workdir
from tests.launch.tiny_config import get_config

ROOT = pathlib.Path(__file__).parents[2]

NOTHING = (
  "stopped outside of the training steps: there was nothing to save; the same command continues."
)


def start(command, workdir, config="tiny_config"):
  return subprocess.Popen(
    [sys.executable, "-m", f"launch.{command}", f"--config=tests/launch/{config}.py",
     f"--workdir={workdir}"],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env={**os.environ, "PYTHONUNBUFFERED": "1"},
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, INTERRUPTED), (signal.SIGINT, CTRL_C)]
)
def test_a_signal_before_the_loop_says_that_nothing_was_to_be_saved(tmp_path, number, code):
  """The signal arrives while the steps compile, after the rows are planned."""
  make_workdir(tmp_path, settings_from_config(get_config()))
  job = start("train", tmp_path)
  for line in job.stdout:
    if line.startswith("rows: "):
      break
  job.send_signal(number)
  output, errors = job.communicate(timeout=300)
  assert (job.returncode, errors) == (code, "")
  assert output.splitlines()[-1] == NOTHING
  assert not (tmp_path / "train" / "lease.json").exists()
  assert not (tmp_path / "train" / "done.json").exists()


def make_raw(root, settings):
  """Writes pairs of single-color images with a darker square, and a text tokenizer."""
  make_workdir(root, settings)
  rng = np.random.default_rng(0)
  colors = rng.integers(0, 256, (24, 1, 1, 3))
  images = np.broadcast_to(colors, (24, 8, 8, 3)).astype(np.uint8)
  images[:, 2:6, 2:6] //= 2
  pairs = [
    {"key": str(i), "caption": f"word{i} word{i + 1}", "split": "train" if i < 20 else "heldout"}
    for i in range(24)
  ]
  write_raw(root / "raw", pairs, images)
  finished = {"config": {}, "summary": {}, "seconds": 0.0, "files": {}}
  write_json(root / "raw" / stages.DONE, {**finished, "id": "raw"})
  config = stages.run_config(settings, epath.Path(root), "text_tokenizer")
  write_json(root / "text_tokenizer" / stages.DONE, {**finished, "config": config, "id": "t"})


@pytest.mark.parametrize(
  ("command", "folder", "number", "code"),
  [
    ("train_vqgan", "vqgan", signal.SIGTERM, INTERRUPTED),
    ("train_clip", "clip", signal.SIGINT, CTRL_C),
  ],
)
@pytest.mark.slow
def test_a_small_training_that_was_stopped_ends_as_one_that_was_not(
  tmp_path, capfd, command, folder, number, code
):
  settings = settings_from_config(small_config.get_config())
  main = importlib.import_module(f"cm3leon_jax.commands.{command}").main
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  for workdir in (whole, stopped):
    make_raw(workdir, settings)
  main(settings, epath.Path(whole))
  job = start(command, stopped, "small_config")
  log = stopped / folder / "metrics.jsonl"
  while job.poll() is None and not (log.exists() and log.stat().st_size):
    time.sleep(0.02)
  job.send_signal(number)
  output, errors = job.communicate(timeout=300)
  assert job.returncode == code, errors
  assert "Traceback" not in errors
  sentence = (
    rf"stopped at step (\d+) of {small_config.STEPS}; saved in {stopped / folder}: the same"
  )
  step = int(re.search(sentence, output)[1])
  assert 10 <= step < small_config.STEPS
  assert not (stopped / folder / stages.DONE).exists()
  capfd.readouterr()
  main(settings, epath.Path(stopped))
  assert f"{folder}: continues from step {step}." in capfd.readouterr().out
  names = [sorted(p.name for p in (root / folder).iterdir()) for root in (whole, stopped)]
  assert names[0] == names[1]
  assert stages.DONE in names[0]
  assert "training" not in names[0]
  params = [(root / folder / "params.safetensors").read_bytes() for root in (whole, stopped)]
  assert params[0] == params[1]
