"""Runs a stage as its command, in a process of its own."""

import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(name: str, config: str, workdir: pathlib.Path, overrides: dict) -> None:
  """Runs `python -m launch.NAME` and passes SIGTERM on to it; exits if it fails or stops.

  Args:
    name: of the command.
    config: file and variant, e.g. "ml_configs/scenes.py:15".
    workdir: of the run.
    overrides: fields of the config and their values, e.g. {"train.steps": 5}.
  """
  command = [sys.executable, "-m", f"launch.{name}", f"--config={config}", f"--workdir={workdir}"]
  command += [f"--config.{field}={value}" for field, value in overrides.items()]
  with subprocess.Popen(command, cwd=ROOT) as process:
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    signal.signal(signal.SIGTERM, previous)
  if code:
    sys.exit(code)
