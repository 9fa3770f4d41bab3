"""Tests which devices a command uses, and the scripts of the demos."""

import glob
import os
import pathlib
import subprocess
import sys

import pytest

from cm3leon_jax import accelerators
from tests.launched import SCENES
from tests.refusals import check_refused

ROOT = pathlib.Path(__file__).parents[2]


def run(*argv, cwd=ROOT, **environment):
  env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  env |= environment
  return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


# Program that runs a command that uses devices, with JAX_PLATFORMS unset.
DEVICES = """
from cm3leon_jax.commands import common
def main(settings):
  with common.use_mesh(settings):
    import jax
    print(jax.devices()[0].platform)
common.run(main, workdir=False)
"""


@pytest.mark.skipif(
  any(map(glob.glob, accelerators.DEVICE_FILES)), reason="this machine has an accelerator"
)
def test_a_machine_without_accelerators_prints_no_warnings():
  result = run(sys.executable, "-c", DEVICES, f"--config={SCENES}")
  assert (result.returncode, result.stdout, result.stderr) == (0, "cpu\n", "")


@pytest.mark.parametrize(
  ("found", "variables", "expected"),
  [
    ([], {}, "cpu"),
    (["/dev/vfio/[0-9]*"], {}, None),
    (["/dev/nvidia[0-9]*"], {}, None),
    ([], {"JAX_PLATFORMS": "tpu"}, "tpu"),
  ],
)
def test_jax_looks_for_accelerators_if_the_machine_has_device_files(
  found, variables, expected, monkeypatch
):
  monkeypatch.setattr(accelerators.glob, "glob", lambda pattern: [p for p in found if p == pattern])
  monkeypatch.setattr(accelerators.os, "environ", variables)
  accelerators.use_cpu_if_alone()
  assert variables.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize("script", ["demo.sh", "demo_instructions.sh"])
def test_demo_refuses_bad_arguments_and_shows_its_usage(tmp_path, script):
  path = str(ROOT / "launch" / script)
  for arguments in (["--minutes", "0"], ["--minutes=2.5"], ["--workdir"], ["--epochs", "3"]):
    check_refused(run("bash", path, *arguments, cwd=tmp_path), arguments[0].partition("=")[0])
  result = run("bash", path, "--help", cwd=tmp_path)
  assert result.returncode == 0
  assert result.stdout.startswith(f"usage: bash launch/{script} [--workdir DIR] [--minutes N]\n")


def test_an_old_python_is_refused(tmp_path):
  old = tmp_path / "old-python"
  old.write_text("#!/bin/sh\nexit 1\n")  # As if the check of the Python version fails.
  old.chmod(0o755)
  result = run("bash", "-c", f'source "{ROOT}/launch/venv.sh"; find_python', PYTHON=str(old))
  check_refused(result, "Python")
