r"""Plans a pod job: estimates memory, days and costs, and writes files that start the job.

  cm3leon plan --config=cm3leon_7b --topology=v5e-256
  cm3leon plan --config=cm3leon_7b --topology=v5e-256 --slices=2 \
    --workdir=gs://my-bucket/7b --out=plan/two_v5e --name=cm3leon-7b \
    --image=us-docker.pkg.dev/my-project/my-repository/cm3leon:tpu
  cm3leon plan --config=cm3leon_7b --topology=h100-64 \
    --workdir=/scratch/7b --out=plan/h100 \
    --image=us-docker.pkg.dev#my-project/my-repository/cm3leon:gpu

With --out, the command writes these files. For TPUs: gke_jobset.yaml and tpu_vm.sh. For GPUs:
gpu_jobset.yaml and slurm.sbatch. Always: plan.json. Files of an earlier plan in that folder are
replaced or removed, unless a user has changed them. The command compiles and starts nothing, so
memory and costs are estimates. `cm3leon aot_compile` checks memory with the real compiler.
docs/pods.md is the guide.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import os
import re
import sys
from typing import Annotated

from etils import epath, epy
from pydantic import Field, NonNegativeInt, PositiveInt

from cm3leon_jax.commands import common, flag, shared_flags, train
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError, did_you_mean

with epy.lazy_imports():
  from cm3leon_jax.planning import hardware, launchers, plan_folder, stage_costs
  from cm3leon_jax.planning import plan as plan_lib


@dataclasses.dataclass(frozen=True)
class Flags(shared_flags.Workdir):
  topology: str | None = None
  """TPU slice, e.g. v5e-256 (or v5litepod-256) or v5p:4x4x8, or type and number of GPUs, e.g.
  h100-64."""
  slices: PositiveInt = 1
  """Number of TPU slices."""
  mfu: Annotated[float, Field(ge=1e-3, le=1.0)] | None = None
  """Model FLOPs utilization that the estimated times assume (default: the published measurement
  that is nearest in model size and chip)."""
  pairs: NonNegativeInt = 0
  """Number of captioned images that the estimated costs of the stages assume (default: as many as
  the training reads in one epoch)."""
  save_bandwidth: Annotated[float, Field(ge=1e-3)] = 0.25
  """Write bandwidth of a host to storage, in GB/s."""
  out: str | None = None
  """Folder for plan.json and the launcher files; requires --workdir."""
  name: str | None = None
  """Name of the run (default: name of the config)."""
  image: str = ""
  """Container image; required for GKE and SLURM (launch/pod/Dockerfile)."""
  queue: str = ""
  """Name of an existing LocalQueue of Kueue in which the GKE job waits."""
  secret: str = ""
  """Kubernetes secret with the key WANDB_API_KEY; it may be absent (default: cm3leon)."""
  service_account: str = ""
  """Service account: name of a Kubernetes account (GKE) or address of a Google Cloud account
  (TPU VM)."""
  reservation: str = ""
  """Name of the reservation to use."""
  priority: str = ""
  """PriorityClass (GKE) or quality of service (SLURM)."""
  cpus: NonNegativeInt = 0
  """CPUs to request on each host (default: half the CPUs of a TPU host, 8 per GPU on a GPU
  host)."""
  memory_gib: NonNegativeInt = 0
  """GiB of memory to request on each host (default: half the memory of a TPU host, all memory of a
  GPU host)."""
  spot: bool = False
  """Request hosts that may be preempted."""
  max_restarts: NonNegativeInt = 20
  """Largest number of restarts after crashes."""
  train_flag: flag.Several | None = None
  """Additional flag of cm3leon train, e.g. --train_flag=--init_from=gs://bucket/run"""


def config_flags(arguments: list[str]) -> list[str]:
  """Returns the flags --config and --config.SECTION.FIELD of a command line as --NAME=VALUE."""
  result, rest = [], iter(arguments)
  for argument in rest:
    if match := re.match(r"--?(config(?:\.[\w.]+)?)(=.*)?$", argument, re.DOTALL):
      name, value = match.groups()
      result.append(f"--{name}{value or '=' + next(rest)}")
  return result


def _default_name(config: str) -> str:
  """Returns a valid Kubernetes name for a config: "cm3leon-7b-paper" for cm3leon_7b:paper."""
  name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"^.*/|\.py\b", "", config).lower())
  return name[:40].strip("-")


def _check_train_flags(values: Iterable[str]) -> None:
  """Raises UserError if `cm3leon train` lacks a flag, before the job fails on the pod."""
  known = {field.name for field in dataclasses.fields(train.Flags)}
  known |= {"config", "workdir", "print_config"}
  for value in values:
    name = re.split("[=.]", value.removeprefix("--"), maxsplit=1)[0]
    if not value.startswith("--") or not {name, name.removeprefix("no")} & known:
      hint = did_you_mean(name.replace("-", "_"), known, "`cm3leon train --help` lists its flags.")
      raise UserError(f"--train_flag is '{value}', but cm3leon train has no flag --{name}: {hint}")


def _check_requests(flags: Flags, devices: hardware.Hardware) -> None:
  """Raises UserError if the job requests more than a host has. Such a job would never start."""
  machine = devices.machine if devices.platform == "tpu" else ()
  for name, has in zip(("cpus", "memory_gib"), machine):
    if (value := getattr(flags, name)) > has:
      raise UserError(f"--{name} is {value:,}; a host of {flags.topology} has {has:,}.")


def main(settings: Settings, flags: Flags) -> None:
  if not flags.topology:
    raise UserError("name the hardware: --topology=v5e-256, or h100-64.")
  train_flags = flags.train_flag or ()
  _check_train_flags(train_flags)
  devices = hardware.load(flags.topology, flags.slices)
  _check_requests(flags, devices)
  given = config_flags(sys.argv[1:])
  name = flags.name or _default_name(given[0].partition("=")[2])
  given.append(f"--workdir={flags.workdir or ''}")
  names = [field.name for field in dataclasses.fields(launchers.PodJob)]
  asked = {key: value for key, value in vars(flags).items() if key in names}
  asked |= {"name": name, "hardware": devices, "flags": tuple(given)}
  job = launchers.PodJob(**asked, metrics_port=settings.train.metrics_port)
  if flags.out:
    launchers.check(job)
  plan = plan_lib.make(settings, devices, flags.mfu, flags.save_bandwidth)
  pairs = flags.pairs or stage_costs.pairs_of_a_pass(settings)
  costs = list(stage_costs.estimate(settings, plan, pairs))
  costs_table = stage_costs.table(costs, plan, pairs, stage_costs.pairs_of_a_pass(settings))
  tables = f"{plan_lib.table(plan, name, flags.spot)}\n{costs_table}"
  if not flags.out:
    print(tables)
    return
  more = (*given, *plan.flags, *train_flags)
  job = dataclasses.replace(job, flags=more, grace_seconds=plan.grace_seconds)
  texts, folder = launchers.files(job), epath.Path(flags.out)
  plan_folder.check(folder, texts)
  print(tables, flush=True)
  numbers = {**dataclasses.asdict(plan), "job": dataclasses.asdict(job)}
  numbers |= {"pairs": pairs, "stages": [dataclasses.asdict(cost) for cost in costs]}
  removed = plan_folder.write(folder, texts, numbers)
  print(f"written to {flags.out}: {', '.join([*texts, plan_folder.NUMBERS])}")
  if removed:
    print(f"removed, from the earlier plan: {', '.join(removed)}")
  keys = launchers.keys(job) if settings.train.wandb else []
  if "tpu_vm.sh" in texts and not os.path.isdir("launch/pod"):
    print("tpu_vm.sh: run this in the root of a checkout of the repository.")
  for sentence in [*launchers.remarks(job), *keys]:
    print(sentence)


if __name__ == "__main__":
  common.run(main, Flags, workdir=False)
