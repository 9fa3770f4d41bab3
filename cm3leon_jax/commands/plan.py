r"""Plans a pod job: estimates memory, days and costs, and writes files that start the job.

  cm3leon plan --config=cm3leon_7b --topology=v5e-256
  cm3leon plan --config=cm3leon_7b --topology=v5e-256 --slices=2 \
    --workdir=gs://my-bucket/7b --out=plan/two_v5e --name=cm3leon-7b \
    --image=us-docker.pkg.dev/my-project/my-repository/cm3leon:tpu
  cm3leon plan --config=cm3leon_7b --topology=h100-64 \
    --workdir=/scratch/7b --out=plan/h100 \
    --image=us-docker.pkg.dev#my-project/my-repository/cm3leon:gpu

With --out, the command writes these files. For TPUs: gke_jobset.yaml and tpu_vm.sh. For GPUs:
slurm.sbatch. Always: plan.json. Files of an earlier plan in that folder are replaced or removed,
unless a user has changed them. The command compiles and starts nothing, so memory and costs are
estimates. `cm3leon aot_compile` checks memory with the real compiler. docs/pods.md is the guide.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import importlib
import os
import re
import sys

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError, did_you_mean

with epy.lazy_imports():
  from cm3leon_jax.planning import hardware, launchers, plan_folder, stage_costs
  from cm3leon_jax.planning import plan as plan_lib


# Other commands define flags with the same names, and tests import all commands in one process.
_SHARED = {"allow_override": True}
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "TPU slice, e.g. v5e-256 (or v5litepod-256) or v5p:4x4x8, or type and number of GPUs, e.g. "
  "h100-64.",
  **_SHARED,
)
_SLICES = flags.DEFINE_integer("slices", 1, "Number of TPU slices.", lower_bound=1, **_SHARED)
_MFU = flags.DEFINE_float(
  "mfu",
  None,
  "Model FLOPs utilization that the estimated times assume (default: the published measurement "
  "that is nearest in model size and chip).",
  lower_bound=1e-3,
  upper_bound=1.0,
)
_PAIRS = flags.DEFINE_integer(
  "pairs",
  0,
  "Number of captioned images that the estimated costs of the stages assume (default: as many as "
  "the training reads in one epoch).",
  lower_bound=0,
)
_SAVE_BANDWIDTH = flags.DEFINE_float(
  "save_bandwidth", 0.25, "Write bandwidth of a host to storage, in GB/s.", lower_bound=1e-3
)
_OUT = flags.DEFINE_string(
  "out", None, "Folder for plan.json and the launcher files; requires --workdir.", **_SHARED
)
_NAME = flags.DEFINE_string("name", None, "Name of the run (default: name of the config).")
_IMAGE = flags.DEFINE_string(
  "image",
  "",
  "Container image; required for GKE and SLURM (launch/pod/Dockerfile).",
  **_SHARED,
)
_QUEUE = flags.DEFINE_string(
  "queue", "", "Name of an existing LocalQueue of Kueue in which the GKE job waits."
)
_SECRET = flags.DEFINE_string(
  "secret", "", "Kubernetes secret with the key WANDB_API_KEY; it may be absent (default: cm3leon)."
)
_ACCOUNT = flags.DEFINE_string(
  "service_account",
  "",
  "Service account: name of a Kubernetes account (GKE) or address of a Google Cloud account "
  "(TPU VM).",
)
_RESERVATION = flags.DEFINE_string("reservation", "", "Name of the reservation to use.")
_PRIORITY = flags.DEFINE_string(
  "priority", "", "PriorityClass (GKE) or quality of service (SLURM)."
)
_CPUS = flags.DEFINE_integer(
  "cpus",
  0,
  "CPUs to request on each host (default: half the CPUs of a TPU host, 8 per GPU on a GPU host).",
  lower_bound=0,
)
_MEMORY = flags.DEFINE_integer(
  "memory_gib",
  0,
  "GiB of memory to request on each host (default: half the memory of a TPU host, all memory of a "
  "GPU host).",
  lower_bound=0,
)
_SPOT = flags.DEFINE_bool("spot", False, "Request hosts that may be preempted.")
_MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts", 20, "Largest number of restarts after crashes.", lower_bound=0
)
_TRAIN_FLAGS = flags.DEFINE_multi_string(
  "train_flag",
  None,
  "Additional flag of cm3leon train, e.g. --train_flag=--init_from=gs://bucket/run",
)


def config_flags(arguments: list[str]) -> list[str]:
  """Returns the flags --config and --config.SECTION.FIELD of a command line as --NAME=VALUE."""
  found, rest = [], iter(arguments)
  for argument in rest:
    if match := re.match(r"--?(config(?:\.[\w.]+)?)(=.*)?$", argument, re.DOTALL):
      name, value = match.groups()
      found.append(f"--{name}{value or '=' + next(rest)}")
  return found


def _default_name(config: str) -> str:
  """Returns a valid Kubernetes name for a config: "cm3leon-7b-paper" for cm3leon_7b:paper."""
  name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"^.*/|\.py\b", "", config).lower())
  return name[:40].strip("-")


def _check_train_flags(values: Iterable[str]) -> None:
  """Raises UserError if `cm3leon train` lacks a flag, before the job fails on the pod."""
  importlib.import_module("cm3leon_jax.commands.train")  # Defines the flags.
  modules = flags.FLAGS.flags_by_module_dict()
  known = {
    flag.name
    for module, defined in modules.items()
    for flag in defined
    if module.startswith("cm3leon_jax.commands.")
  }
  for value in values:
    name = re.split("[=.]", value.removeprefix("--"), maxsplit=1)[0]
    if not value.startswith("--") or not {name, name.removeprefix("no")} & known:
      hint = did_you_mean(name.replace("-", "_"), known, "`cm3leon train --help` lists its flags.")
      raise UserError(f"--train_flag is '{value}', but cm3leon train has no flag --{name}: {hint}")


def _check_requests(devices: hardware.Hardware) -> None:
  """Raises UserError if the job requests more than a host has. Such a job would never start."""
  for flag, has in zip((_CPUS, _MEMORY), devices.machine if devices.platform == "tpu" else ()):
    if flag.value > has:
      raise UserError(f"--{flag.name} is {flag.value:,}; a host of {_TOPOLOGY.value} has {has:,}.")


def main(settings: Settings) -> None:
  if not _TOPOLOGY.value:
    raise UserError("name the hardware: --topology=v5e-256, or h100-64.")
  _check_train_flags(_TRAIN_FLAGS.value or ())
  devices = hardware.load(_TOPOLOGY.value, _SLICES.value)
  _check_requests(devices)
  given = config_flags(sys.argv[1:])
  name = _NAME.value or _default_name(given[0].partition("=")[2])
  given.append(f"--workdir={flags.FLAGS.workdir or ''}")
  job = launchers.PodJob(
    name=name, hardware=devices, flags=tuple(given), image=_IMAGE.value, queue=_QUEUE.value,
    secret=_SECRET.value, spot=_SPOT.value, max_restarts=_MAX_RESTARTS.value,
    service_account=_ACCOUNT.value, reservation=_RESERVATION.value, priority=_PRIORITY.value,
    cpus=_CPUS.value, memory_gib=_MEMORY.value, metrics_port=settings.train.metrics_port,
  )  # fmt: skip
  if _OUT.value:
    launchers.check(job)
  plan = plan_lib.make(settings, devices, _MFU.value, _SAVE_BANDWIDTH.value)
  pairs = _PAIRS.value or stage_costs.pairs_of_a_pass(settings)
  costs = list(stage_costs.estimate(settings, plan, pairs))
  costs_table = stage_costs.table(costs, plan, pairs, stage_costs.pairs_of_a_pass(settings))
  tables = f"{plan_lib.table(plan, name, _SPOT.value)}\n{costs_table}"
  if not _OUT.value:
    print(tables)
    return
  more = (*given, *plan.flags, *(_TRAIN_FLAGS.value or ()))
  job = dataclasses.replace(job, flags=more, grace_seconds=plan.grace_seconds)
  texts, folder = launchers.files(job), epath.Path(_OUT.value)
  plan_folder.check(folder, texts)
  print(tables, flush=True)
  numbers = {**dataclasses.asdict(plan), "job": dataclasses.asdict(job)}
  numbers |= {"pairs": pairs, "stages": [dataclasses.asdict(cost) for cost in costs]}
  removed = plan_folder.write(folder, texts, numbers)
  print(f"written to {_OUT.value}: {', '.join([*texts, plan_folder.NUMBERS])}")
  if removed:
    print(f"removed, from the earlier plan: {', '.join(removed)}")
  keys = launchers.keys(job) if settings.train.wandb else []
  if "tpu_vm.sh" in texts and not os.path.isdir("launch/pod"):
    print("tpu_vm.sh: run this in the root of a checkout of the repository.")
  for sentence in [*launchers.remarks(job), *keys]:
    print(sentence)


if __name__ == "__main__":
  common.run(main, workdir=None)
