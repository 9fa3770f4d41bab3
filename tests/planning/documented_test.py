"""Compiles the plans and programs of the documents for their slices, in processes of their own.

The commands are read from the pages and from docstrings, so that they cannot drift.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from cm3leon_jax.planning import hardware, memory, plan
from cm3leon_jax.settings import settings_from_config

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("README.md", "docs/pods.md", "docs/scaling.md", "cm3leon_jax/commands/plan.py")
COMMAND = re.compile(r"(?:python -m launch\.|cm3leon )(aot_compile|plan) ([^\n`#|]*)")


@dataclasses.dataclass(frozen=True)
class Launch:
  """A plan of `launch.plan`, or a compilation of `launch.aot_compile`.

  Attributes:
    command: "plan" or "aot_compile".
    topology: v5e-256, h100-64.
    slices: number of slices.
    flags: of the config, and of `launch.aot_compile`.
  """

  command: str
  topology: str
  slices: int
  flags: tuple[str, ...]

  @property
  def hardware(self):
    return hardware.load(self.topology, self.slices)

  def settings(self, more=()):
    """Returns the settings that the flags make, with further flags of the config."""
    given = [flag for flag in (*self.flags, *more) if flag.startswith("--config")]
    file, *fields = (flag.removeprefix("--config") for flag in given)
    name, _, variant = file.removeprefix("=").partition(":")
    module = importlib.import_module(f"cm3leon_jax.configs.{pathlib.Path(name).stem}")
    config = module.get_config(variant)
    for field in fields:
      path, _, value = field.removeprefix(".").partition("=")
      section, _, leaf = path.partition(".")
      config[section][leaf] = yaml.safe_load(value)
    return settings_from_config(config)

  @functools.cached_property
  def planned(self):
    return plan.make(self.settings(), self.hardware, 0.4, 0.25)


def launches(path: pathlib.Path) -> list[Launch]:
  """Returns the commands of a page or docstring, without searches, which take hours."""
  text = re.sub(r"\\\n\s*", " ", path.read_text())
  found = []
  for command, rest in COMMAND.findall(text):
    words = shlex.split(rest)
    given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    if "topology" not in given or "search" in given:
      continue
    taken = ("config", "program", "batch_per_device", "decode_batch", "decode_positions")
    flags = tuple(word for word in words if word.startswith(tuple(f"--{name}" for name in taken)))
    slices = int(given.get("slices", 1))
    found.append(Launch(command, given["topology"], slices, flags))
  return found


FOUND = {page: launches(ROOT / page) for page in PAGES}
LAUNCHES = list(dict.fromkeys(launch for found in FOUND.values() for launch in found))


def trains(launch: Launch) -> bool:
  return not any(flag.startswith(("--program", "--decode")) for flag in launch.flags)


def test_the_commands_of_the_pages_are_read():
  of_7b = ("--config=ml_configs/cm3leon_7b.py",)
  assert Launch("plan", "v5e-256", 2, of_7b) in FOUND["docs/pods.md"]
  assert Launch("plan", "h100-64", 1, of_7b) in FOUND["docs/pods.md"]
  assert len(FOUND["docs/scaling.md"]) >= 4
  assert FOUND["README.md"]
  assert len(FOUND["cm3leon_jax/commands/plan.py"]) == 3


@pytest.mark.parametrize("launch", [x for x in LAUNCHES if trains(x)], ids=str)
def test_a_documented_launch_fits_by_the_estimate(launch):
  settings, hw = launch.settings(), launch.hardware
  if launch.command == "plan":
    made = launch.planned
    assert made.rows_per_device == settings.train.rows_per_device  # As it stands in the config.
    settings = launch.settings(made.flags)
  if not any("batch_per_device" in flag for flag in launch.flags):
    memory.check(settings, settings.mesh.over(hw.chips), hw.memory * 2**30, hw.platform)


@pytest.mark.slow
@pytest.mark.tpu_backend
@pytest.mark.parametrize("launch", [x for x in LAUNCHES if x.hardware.platform == "tpu"], ids=str)
def test_a_documented_launch_compiles_and_fits_its_chip(launch, tmp_path):
  pytest.importorskip("libtpu")
  path = tmp_path / "report.json"
  flags = (*launch.flags, *(launch.planned.flags if launch.command == "plan" else ()))
  command = [sys.executable, "-m", "launch.aot_compile", *flags, f"--json={path}"]
  command += [f"--topology={launch.topology}", f"--slices={launch.slices}"]
  # The plans are of optimized programs.
  environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
  result = subprocess.run(
    command, capture_output=True, text=True, timeout=900, env=environment, check=False
  )
  assert result.returncode == 0, result.stderr[-2_000:]
  reports = json.loads(path.read_text())
  for name, report in reports.items():
    if name != "topology":
      needed = report.get("rest_gib", 0) + max(report["sum_gib"], report["peak_gib"])
      assert needed < report["hbm_gib"], name
    if name == "train":
      assert report["estimate_gib"] == pytest.approx(report["sum_gib"], rel=0.15)
