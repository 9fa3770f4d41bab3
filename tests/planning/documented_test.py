"""Compiles the launch commands of the documents for their slices, in processes of their own.

The commands are read from the pages and from launch/pod, so that they cannot drift.
"""

import dataclasses
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

from cm3leon_jax.planning import memory
from cm3leon_jax.planning.topology import CHIPS, SLICES
from cm3leon_jax.settings import settings_from_config

ROOT = pathlib.Path(__file__).parents[2]
POD = ROOT / "launch" / "pod"
PAGES = ("README.md", "docs/pods.md", "docs/scaling.md")
ACCELERATORS = {
  "tpu-v5-lite-podslice": "v5e", "tpu-v5p-slice": "v5p", "tpu-v6e-slice": "v6e",
  "v5litepod": "v5e", "v5p": "v5p", "v6e": "v6e",
}  # fmt: skip
LAUNCHERS = ("launch.pod.gke_jobset", "xpk.sh", "tpu_vm.sh run", "slurm_gpu.sbatch")
COMPILED = r"(?:python -m launch\.|cm3leon )(?:aot_compile|plan) "
GPUS = 8  # Of a node of SLURM.
# JAX takes three quarters of the memory of a GPU, here of one with 80 GB.
GPU_MEMORY = 0.75 * 80e9


@dataclasses.dataclass(frozen=True)
class Launch:
  """A launch of `launch.train`, or a compilation of `launch.aot_compile`.

  Attributes:
    topology: chip and shape, v5e:16x16; "gpu" for GPUs.
    slices: number of slices, or of nodes with GPUs.
    flags: of the config, and of `launch.aot_compile`.
  """

  topology: str
  slices: int
  flags: tuple[str, ...]

  def settings(self):
    """Returns the settings that the flags make."""
    file, *fields = (flag.removeprefix("--config") for flag in self.flags if "config" in flag)
    name, _, variant = file.removeprefix("=").partition(":")
    module = importlib.import_module(f"cm3leon_jax.configs.{pathlib.Path(name).stem}")
    config = module.get_config(variant)
    for field in fields:
      path, _, value = field.removeprefix(".").partition("=")
      section, _, leaf = path.partition(".")
      config[section][leaf] = yaml.safe_load(value)
    return settings_from_config(config)


def whole_name(topology: str) -> str:
  """v5e-256 and v5e:16x16 are v5e:16x16."""
  chip, _, _ = topology.replace("-", ":", 1).partition(":")
  return f"{chip}:{SLICES[topology]}" if topology in SLICES else topology


def blocks(path: pathlib.Path) -> list[str]:
  """Returns the blocks of commands of a page, or of the comments of a file; lines are joined."""
  text = path.read_text()
  if path.suffix == ".md":
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
  elif path.suffix == ".py":
    found = [text.split('"""')[1]]
  else:
    found = ["\n".join(line[1:].strip() for line in text.split("\n") if line.startswith("#"))]
  return [re.sub(r"\\\n\s*", " ", block) for block in found]


def variables(block: str, text: str) -> dict[str, str]:
  """Returns NAME -> value of a block; of an accelerator that it does not set, that of the file."""
  found = dict(re.findall(r"\b([A-Z_]+)=([\w./:#-]+)", block))
  slice_ = re.search(r"(v5litepod|v5p|v6e)-\d+", text)
  if slice_ and not found.keys() & {"ACCELERATOR", "TPU_TYPE"}:
    found["TPU_TYPE"] = slice_[0]
  return found


def launch_of(line: str, names: dict[str, str]) -> Launch:
  """Reads a command; `names` are the variables that are set for it."""
  words = shlex.split(line.partition("#")[0].partition("|")[0])
  flags = tuple(word for word in words if word.startswith("--config"))
  if re.search(COMPILED, line):
    given = {name: value for name, _, value in (word[2:].partition("=") for word in words)}
    rest = ("program", "batch_per_device", "decode_batch", "decode_positions")
    flags += tuple(f"--{name}={given[name]}" for name in rest if name in given)
    return Launch(whole_name(given["topology"]), int(given.get("slices", 1)), flags)
  if "slurm_gpu" in line:
    return Launch("gpu", int(re.search(r"--nodes=(\d+)", line)[1]), flags)
  slices = int(names.get("SLICES", 1))
  if "TOPOLOGY" in names:
    return Launch(f"{ACCELERATORS[names['ACCELERATOR']]}:{names['TOPOLOGY']}", slices, flags)
  chip, _, count = names.get("TPU_TYPE", names.get("ACCELERATOR", "")).partition("-")
  return Launch(whole_name(f"{ACCELERATORS[chip]}-{count}"), slices, flags)


def launches(path: pathlib.Path) -> list[Launch]:
  """Returns the launches of a page or file, without searches, which take hours."""
  text = path.read_text()
  if path.suffix == ".yaml":
    return [manifest(yaml.safe_load(text))]
  found = []
  for block in blocks(path):
    names = variables(block, text)
    for line in block.split("\n"):
      known = re.search(COMPILED, line) or any(name in line for name in LAUNCHERS)
      if known and "--config" in line and "--search" not in line:
        found.append(launch_of(line, names))
  return found


def manifest(values: dict) -> Launch:
  """Returns the launch of a JobSet."""
  job = values["spec"]["replicatedJobs"][0]
  pod = job["template"]["spec"]["template"]["spec"]
  chip, shape = pod["nodeSelector"].values()
  flags = tuple(x for x in pod["containers"][0]["args"] if x.startswith("--config"))
  return Launch(f"{ACCELERATORS[chip]}:{shape}", job["replicas"], flags)


FILES = [*(ROOT / page for page in PAGES), *sorted(POD.glob("*"))]
FOUND = {str(path.relative_to(ROOT)): launches(path) for path in FILES if path.is_file()}
LAUNCHES = list(dict.fromkeys(launch for found in FOUND.values() for launch in found))


def trains(launch: Launch) -> bool:
  return not any(flag.startswith(("--program", "--decode")) for flag in launch.flags)


def test_the_commands_of_every_launcher_are_read():
  """And every flag of the real sizes in these files belongs to one of them."""
  for name in LAUNCHERS:
    assert any(name in path.read_text() for path in FILES if path.is_file()), name
  assert len(FOUND["docs/pods.md"]) >= 4
  assert {launch.topology for launch in FOUND["docs/pods.md"]} >= {"v5e:16x16", "gpu"}
  for file in ("gke_jobset.py", "gke_jobset.yaml", "xpk.sh", "tpu_vm.sh", "slurm_gpu.sbatch"):
    assert FOUND[f"launch/pod/{file}"], file
  assert len(FOUND["docs/scaling.md"]) >= 4
  assert Launch(
    "v5e:16x16", 2,
    ("--config=ml_configs/cm3leon_7b.py", "--config.mesh.data=2", "--config.mesh.fsdp=16",
     "--config.mesh.fsdp_inner=16"),
  ) in FOUND["docs/pods.md"]  # fmt: skip


@pytest.mark.parametrize("launch", [x for x in LAUNCHES if trains(x)], ids=str)
def test_a_documented_launch_fits_by_the_estimate(launch):
  settings = launch.settings()
  if launch.topology == "gpu":
    shape, limit = settings.mesh.over(GPUS * launch.slices), GPU_MEMORY
  else:
    chip, _, torus = launch.topology.partition(":")
    chips = 1
    for n in torus.split("x"):
      chips *= int(n)
    shape, limit = settings.mesh.over(chips * launch.slices), CHIPS[chip].hbm * 2**30
  if not any("batch_per_device" in flag for flag in launch.flags):
    memory.check(settings, shape, limit, "gpu" if launch.topology == "gpu" else "tpu")


@pytest.mark.slow
@pytest.mark.tpu_backend
@pytest.mark.parametrize("launch", [x for x in LAUNCHES if x.topology != "gpu"], ids=str)
def test_a_documented_launch_compiles_and_fits_its_chip(launch, tmp_path):
  pytest.importorskip("libtpu")
  path = tmp_path / "report.json"
  command = [sys.executable, "-m", "launch.aot_compile", *launch.flags, f"--json={path}"]
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
