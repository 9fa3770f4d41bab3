"""What experiments of several trainings share: the choice of conditions, and stages as commands."""

from collections.abc import Iterable, Sequence
import pathlib
import signal
import subprocess
import sys

from cm3leon_jax.config import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def chosen_conditions(argv: Sequence[str], asked: Sequence[str], known: Iterable[str]) -> list[str]:
  """Returns the conditions that are asked for, in the order of the known ones.

  Args:
    argv: the command and what is left of its line; only flags are taken.
    asked: of the flag --conditions.
    known: all conditions.

  Raises:
    UserError: an argument that is no flag, or a condition that is not known, or none.
  """
  if len(argv) > 1:
    raise UserError(
      f"unexpected argument '{argv[1]}': this command takes flags only (--name=value)."
    )
  known = list(known)
  names = [name for name in known if name in asked]
  if not names or {*asked} - {*names}:
    raise UserError(f"--conditions is '{','.join(asked)}'; it must name some of {','.join(known)}.")
  return names


def run_stage(name: str, config: str, workdir: pathlib.Path, overrides: dict) -> None:
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
