"""Runs a job's scripts with fakes of gcloud, srun etc. that record their calls."""

import os
import pathlib
import shutil
import subprocess
import sysconfig

from cm3leon_jax.planning import hardware, launchers

ROOT = pathlib.Path(__file__).parents[1]
POD = ROOT / "launch" / "pod"
# pip also installs shellcheck and hadolint here.
PROGRAMS = pathlib.Path(sysconfig.get_path("scripts"))
MISTAKE = 2  # Exit code of every command after a mistake by the user.
FLAGS = [
  "--config=ml_configs/cm3leon_7b.py:paper",
  "--workdir=gs://bucket/7b",
  "--config.raw.source=a b/it's {0..9}$(id)*\"$HOME",
]
CLUSTER = {"PROJECT": "project", "ZONE": "us-west4-a"}
KEY = "0123456789abcdef0123456789abcdef01234567"  # Has the format of a Weights & Biases key.


class Recorders:
  """Folder of fake programs, the first on PATH, which record their calls."""

  def __init__(self, folder: pathlib.Path):
    self.home, self._programs, self._log = folder / "home", folder / "programs", folder / "log"
    self.home.mkdir()
    self._programs.mkdir()

  def add(self, name: str, then: str = "") -> None:
    """Adds a fake program that records its call and then runs the bash code `then`."""
    program = self._programs / name
    # Writes each call at once, so that parallel calls do not mix.
    record = f"call=$(printf '%s\\037' '{name}' \"$@\")\nprintf '%s\\n' \"$call\" >>'{self._log}'"
    program.write_text(f"#!/usr/bin/env bash\n{record}\n{then}\n")
    program.chmod(0o755)

  def copy(self, name: str, path: pathlib.Path) -> None:
    """Replaces the file at `path` by the fake program `name`."""
    path.unlink()
    shutil.copy(self._programs / name, path)

  def calls(self, name: str) -> list[list[str]]:
    """Returns the arguments of each call of the program `name`, in order."""
    lines = self._log.read_text().splitlines() if self._log.exists() else []
    return [call[1:] for call in (line.split("\037")[:-1] for line in lines) if call[0] == name]

  def run(self, *argv, environment=None):
    variables = {"HOME": str(self.home), "TMPDIR": str(self.home), "PYTHONPATH": str(ROOT)}
    variables["PATH"] = f"{self._programs}:{os.environ['PATH']}"
    variables |= environment or {}
    return subprocess.run(
      argv, cwd=self.home, capture_output=True, text=True, timeout=60, env=variables, check=False
    )


def write(folder, topology="v5e-256", slices=1, **options):
  """Writes the files of a job as `launch.plan` would; returns their folder."""
  options = {"image": "registry#image:tag", "grace_seconds": 1200, "max_restarts": 7, **options}
  job = launchers.PodJob("run", hardware.load(topology, slices), tuple(FLAGS), **options)
  folder = folder / "plan"
  folder.mkdir(exist_ok=True)
  for name, text in launchers.files(job).items():
    (folder / name).write_text(text)
  return folder


def run_script(recorders, script, *arguments, **environment):
  return recorders.run("bash", str(script), *arguments, environment=environment)


def assert_one_sentence(result, start):
  assert result.returncode == MISTAKE
  assert result.stderr.startswith(f"error: {start}")
  assert result.stderr.count("\n") == 1
  assert result.stdout == ""
