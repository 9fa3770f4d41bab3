"""Tests that the commands in the documentation compile for their TPU slices and GPUs.

The tests read the commands `cm3leon plan` and `cm3leon aot_compile` from pages and docstrings, and
run each in a separate process.
"""

import dataclasses
import importlib
import math
import pathlib
import re
import shlex

import pytest
import yaml

from cm3leon_jax.mesh import AXES, MeshConfig
from cm3leon_jax.planning import memory
from cm3leon_jax.planning.search import meshes
from cm3leon_jax.planning.topology import CHIPS, SLICES, Topology
from cm3leon_jax.settings import settings_from_config
from tests.planning.compiled import aot_compile

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = ROOT / "cm3leon_jax" / "commands"
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES += [path for path in (COMMANDS / "aot_compile.py", COMMANDS / "plan.py") if path.exists()]
COMMAND = r"(?:python -m launch\.|cm3leon )(aot_compile|plan) "
MEASURED = ("program", "batch_per_device", "decode_batch", "decode_positions")
GPUS_OF_A_HOST = 8
GPU_GIB = 0.75 * 79.65  # By default, JAX uses three quarters of the 80 GB of an A100 or H100.


@dataclasses.dataclass(frozen=True)
class Launch:
  """Job that a page plans or compiles.

  Attributes:
    topology: chip and slice shape (v5e:16x16), or GPU and number of GPUs (h100-64).
    flags: config flags and other flags of `launch.aot_compile`.
  """

  topology: str
  slices: int
  flags: tuple[str, ...]

  @property
  def on_gpus(self) -> bool:
    return ":" not in self.topology

  @property
  def devices(self) -> int:
    shape = self.topology.replace("-", ":").partition(":")[2]
    return self.slices * math.prod(map(int, shape.split("x")))

  @property
  def settings(self):
    file, *fields = (
      flag.removeprefix("--config") for flag in self.flags if flag.startswith("--config")
    )
    name, _, variant = file.removeprefix("=").partition(":")
    module = importlib.import_module(f"cm3leon_jax.configs.{pathlib.Path(name).stem}")
    config = module.get_config(*filter(None, [variant]))
    for field in fields:
      path, _, value = field.removeprefix(".").partition("=")
      section, _, leaf = path.partition(".")
      config[section][leaf] = yaml.safe_load(value)
    return settings_from_config(config)


def commands(text: str) -> list[str]:
  """Returns the commands in a page or docstring, including those inside a sentence.

  Joins continued lines. Omits searches, which take hours and have their own tests.
  """
  text = re.sub(r"\\\n\s*", " ", text)
  found = [line for line in text.split("\n") if re.match(f" *{COMMAND}", line)]
  found += [span for span in re.findall(r"`([^`\n]+)`", text) if re.match(COMMAND, span)]
  return [line.strip() for line in found if "--topology=" in line and "--search" not in line]


def mesh_flags(topology: str, slices: int) -> tuple[str, ...]:
  """Returns flags for the mesh that `launch.plan` would choose."""
  chip, _, shape = topology.partition(":")
  if shape:
    torus = tuple(map(int, shape.split("x")))
    config = next(meshes(Topology(topology, CHIPS[chip], torus, slices, ())))
  else:
    hosts = int(topology.partition("-")[2]) // GPUS_OF_A_HOST
    config = MeshConfig(data=hosts, fsdp=GPUS_OF_A_HOST)
  return tuple(f"--config.mesh.{axis}={n}" for axis, n in zip(AXES, (
    config.data, config.fsdp, config.fsdp_inner, config.tensor,
  ), strict=True))  # fmt: skip


def launch_of(line: str) -> Launch:
  words = shlex.split(line.partition("#")[0])
  given = dict(word[2:].split("=", 1) for word in words if "=" in word)
  topology, slices = given["topology"], int(given.get("slices", 1))
  if topology in SLICES:
    topology = f"{topology.partition('-')[0]}:{SLICES[topology]}"
  flags = tuple(word for word in words if word.startswith("--config"))
  config, *fields = flags
  # A name instead of a path means a config of the package.
  if not config.endswith(".py") and "/" not in config:
    config = config.replace("=", "=ml_configs/") + ".py"
  if re.search(COMMAND, line)[1] == "plan" and not any("config.mesh" in flag for flag in flags):
    fields += mesh_flags(topology, slices)
  fields += [f"--{name}={given[name]}" for name in MEASURED if name in given]
  return Launch(topology, slices, (config, *fields))


FOUND = {path: [launch_of(line) for line in commands(path.read_text())] for path in FILES}
LAUNCHES = list(dict.fromkeys(launch for found in FOUND.values() for launch in found))
TRAINED = [
  x
  for x in LAUNCHES
  if not any(f.startswith(("--program", "--batch", "--decode")) for f in x.flags)
]


def test_the_commands_are_read():
  line = "python -m launch.plan --config=ml_configs/cm3leon_7b.py --topology=v5e-256 --slices=2"
  mesh = "--config.mesh.data=2 --config.mesh.fsdp=16 --config.mesh.fsdp_inner=16"
  config = "--config=ml_configs/cm3leon_7b.py"
  assert launch_of(line) == Launch(
    "v5e:16x16", 2, (config, *mesh.split(), "--config.mesh.tensor=1")
  )
  assert launch_of("cm3leon plan --config=cm3leon_7b --topology=h100-64").flags == (
    config, "--config.mesh.data=8", "--config.mesh.fsdp=8", "--config.mesh.fsdp_inner=1",
    "--config.mesh.tensor=1",
  )  # fmt: skip
  assert len(FOUND[ROOT / "docs" / "scaling.md"]) >= 5
  assert FOUND[COMMANDS / "aot_compile.py"]


@pytest.mark.parametrize("launch", TRAINED, ids=str)
def test_a_documented_launch_fits_by_the_estimate(launch):
  shape = launch.settings.mesh.over(launch.devices)
  limit = GPU_GIB if launch.on_gpus else CHIPS[launch.topology.partition(":")[0]].hbm
  platform = "gpu" if launch.on_gpus else "tpu"
  memory.check(launch.settings, shape, int(limit * 2**30), platform)


@pytest.mark.slow
@pytest.mark.tpu_backend
@pytest.mark.parametrize("launch", [x for x in LAUNCHES if not x.on_gpus], ids=str)
def test_a_documented_launch_compiles_and_fits_its_chip(launch, tmp_path):
  pytest.importorskip("libtpu")
  slice_flags = (f"--topology={launch.topology}", f"--slices={launch.slices}")
  reports = aot_compile(tmp_path, *launch.flags, *slice_flags)
  # With adapters, the estimate is at most 12% above the compiler's number (docs/adapters.md).
  below, above = (0.01, 0.12) if launch.settings.adapter.rank else (0.1, 0.1)
  for name, report in reports.items():
    if name != "topology":
      assert report["sum_gib"] + report.get("rest_gib", 0) < report["hbm_gib"], name
    if name == "train":
      assert -below < report["estimate_gib"] / report["sum_gib"] - 1 < above
