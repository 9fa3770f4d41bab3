"""Parses conditions, runs stages and stores results of experiments with several trainings."""

from collections.abc import Iterable, Sequence
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
from scipy import stats

from cm3leon_jax.commands.malloc import HUGE_PAGES
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json

ROOT = pathlib.Path(__file__).resolve().parents[2]


def chosen_conditions(
  argv: Sequence[str], asked: Sequence[str], known: Iterable[str], flag: str = "conditions"
) -> list[str]:
  """Returns the conditions that a flag requests, in the order of the known conditions.

  Args:
    argv: arguments that remain after the flags are parsed; only the name of the command may remain.
    asked: conditions that the flag names.
    known: all conditions.
    flag: name of the flag, for messages.

  Raises:
    UserError: an argument is not a flag, a condition is unknown, or none is requested.
  """
  if len(argv) > 1:
    raise UserError(
      f"unexpected argument '{argv[1]}': this command takes flags only (--name=value)."
    )
  known = list(known)
  names = [name for name in known if name in asked]
  if not names or {*asked} - {*names}:
    raise UserError(f"--{flag} is '{','.join(asked)}'; it must name some of {','.join(known)}.")
  return names


def run_stage(name: str, config: str, workdir: pathlib.Path, overrides: dict) -> None:
  """Runs `python -m launch.NAME` and forwards SIGTERM. Exits if the command fails or is stopped.

  Args:
    name: name of the command.
    config: file and variant, e.g. "examples/scenes/config.py:15".
    workdir: folder of the run.
    overrides: fields of the config and their values, e.g. {"train.steps": 5}.
  """
  command = [sys.executable, "-m", f"launch.{name}", f"--config={config}", f"--workdir={workdir}"]
  command += [f"--config.{field}={value}" for field, value in overrides.items()]
  with subprocess.Popen(command, cwd=ROOT, env={**HUGE_PAGES, **os.environ}) as process:
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    signal.signal(signal.SIGTERM, previous)
  if code:
    sys.exit(code)


def link_stages(shared: pathlib.Path, run: pathlib.Path, names: Iterable[str]) -> None:
  """Creates the folder of a run, with links to the finished stages of `shared`."""
  run.mkdir(parents=True, exist_ok=True)
  for name in names:
    if not (run / name).is_symlink():
      (run / name).symlink_to(os.path.relpath(shared / name, run))


def write_results(workdir: pathlib.Path, result: dict, markdown: str) -> None:
  """Writes results.json and table.md; replaces earlier files."""
  write_json(workdir / "results.json", result)
  (workdir / "table.md").write_text(markdown, encoding="utf-8")


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
  """Computes a 95% confidence interval of the mean with Student's t; None for one value.

  student_interval([1, 2, 3]) = (-0.484, 4.484): 2 -+ 4.303 x 1 / sqrt(3)
  """
  if len(values) < 2:
    return None
  half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
  return float(np.mean(values) - half), float(np.mean(values) + half)
