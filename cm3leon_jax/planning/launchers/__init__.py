"""Writes the files that start a job, by filling one template per launcher with the job's plan.

A launcher restarts a job that crashed, or that saved and stopped on request (exit code 75). It does
not restart a job that ended because of a user's mistake (exit code 2). Secrets are read from the
environment or from the launcher's store when the job runs, so no file contains a secret.
docs/pods.md is the guide.
"""

from collections.abc import Sequence
import dataclasses
from importlib import resources
import json
import pathlib
import re
import shlex

import jinja2

from cm3leon_jax.errors import INTERRUPTED, UserError
from cm3leon_jax.planning.hardware import GPU_FRACTION, Hardware

MISTAKE = UserError.exit_code
SUFFIX = ".jinja"
TEMPLATES = dict.fromkeys(("gke_jobset.yaml", "gpu_jobset.yaml"), "jobset.yaml")
TRIES = 5  # Number of attempts to create TPU VMs.
KUBERNETES_SECRET = "cm3leon"
SECRET = "from a Secret: kubectl create secret generic {secret} "
SECRET += '--from-literal=WANDB_API_KEY="$WANDB_API_KEY"'
# Maps a file to how the processes that it starts get the Weights & Biases key.
KEYS = {
  "gke_jobset.yaml": SECRET,
  "gpu_jobset.yaml": SECRET,
  "tpu_vm.sh": "from the environment of tpu_vm.sh, at `watch` and `run`",
  "slurm.sbatch": "from the environment of sbatch",
}
NAME = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"  # Of Kubernetes.
WORD = r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?"
ADDRESS = r"[\w.-]+@[\w.-]+"
# Folders of this repository that are copied into the container image, and by tpu_vm.sh.
COPIED = ("cm3leon_jax", "launch", "ml_configs")


@dataclasses.dataclass(frozen=True)
class PodJob:
  """Run for which launcher files are written.

  Attributes:
    name: name of the run in Kubernetes and other systems.
    flags: flags of `cm3leon train`, including --config and --workdir.
    image: container image. If empty, files that need an image are not written.
    queue: name of an existing LocalQueue of Kueue; empty without Kueue.
    secret: name of a Kubernetes Secret that contains WANDB_API_KEY; empty means cm3leon. The Secret
      need not exist.
    spot: whether to use cheaper machines that may be preempted at any time.
    max_restarts: number of restarts after crashes.
    grace_seconds: seconds after SIGTERM in which the job can save.
    service_account: Kubernetes name or Google Cloud address; empty means the default account.
    reservation: name of reserved machines; empty means none.
    priority: PriorityClass of Kubernetes, or quality of service of SLURM; empty means the default.
    cpus: CPUs to request on each host; 0 means half of a TPU host, or 8 per GPU.
    memory_gib: GiB to request on each host; 0 means half of a TPU host, or all of a GPU host.
    metrics_port: port on which process 0 serves metrics; 0 means none.
  """

  name: str
  hardware: Hardware
  flags: tuple[str, ...]
  image: str = ""
  queue: str = ""
  secret: str = ""
  spot: bool = False
  max_restarts: int = 20
  grace_seconds: int = 900
  service_account: str = ""
  reservation: str = ""
  priority: str = ""
  cpus: int = 0
  memory_gib: int = 0
  metrics_port: int = 0

  @property
  def has_cloud_account(self) -> bool:
    """Whether the service account is one of Google Cloud."""
    return "@" in self.service_account

  @property
  def requested_cpus(self) -> int:
    """Number of CPUs that a pod on a TPU host requests."""
    return self.cpus or self.hardware.requests[0]

  @property
  def requested_memory(self) -> int:
    """Number of GiB that a pod on a TPU host requests."""
    return self.memory_gib or self.hardware.requests[1]

  @property
  def workdir(self) -> str:
    """Workdir of the run; empty if no flag sets it."""
    return next((f.partition("=")[2] for f in self.flags if f.startswith("--workdir=")), "")

  @property
  def shared_folder(self) -> str:
    """Top folder of a workdir that is not in a bucket, such as /scratch of /scratch/run; or ""."""
    return "/" + self.workdir.split("/")[1] if self.workdir.startswith("/") else ""

  @property
  def config(self) -> str:
    """File or name of the config, without its variant; empty if no flag sets it."""
    values = (f.partition("=")[2] for f in self.flags if f.startswith("--config="))
    return next(values, "").partition(":")[0]


def check(job: PodJob) -> None:
  """Raises UserError, naming a flag of `cm3leon plan`, if no launcher can start the job."""
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", job.name):
    raise UserError(
      f"--name is '{job.name}'; it must have at most 40 characters (lower-case letters, digits and "
      "hyphens), start with a letter and not end with a hyphen."
    )
  gpu = job.hardware.platform == "gpu"
  patterns = {"queue": NAME, "secret": NAME, "service_account": f"{NAME}|{ADDRESS}"}
  patterns |= {"reservation": WORD, "priority": WORD if gpu else NAME}
  for flag, pattern in patterns.items():
    value = getattr(job, flag)
    if value and not re.fullmatch(pattern, value, re.ASCII):
      raise UserError(f"--{flag} is '{value}'; it must be a name of letters, digits, '-' and '.'.")
  if job.reservation and job.spot:
    raise UserError("--reservation and --spot exclude each other: give only one.")
  where = "gs://BUCKET/FOLDER" + (" or /SHARED/FOLDER" * gpu)
  if not re.match(r"(gs://|/)." if gpu else "gs://.", job.workdir):
    raise UserError(
      f"--workdir is '{job.workdir}'; it must be {where}, because all hosts use one workdir."
    )


def files(job: PodJob) -> dict[str, str]:
  """Renders the files of all launchers that can run a job. Maps file names to texts.

  Raises:
    UserError: see `check`.
  """
  check(job)
  gpu = job.hardware.platform == "gpu"
  names: list[str] = []
  if not gpu and job.hardware.tpu.runtime:
    names.append("tpu_vm.sh")
  if job.image:
    names += _with_image(job)
  environment = _environment()
  values = {"job": job, "hw": job.hardware, "GPU_FRACTION": GPU_FRACTION}
  values |= {"secret": job.secret or KUBERNETES_SECRET}
  values |= {"MISTAKE": MISTAKE, "INTERRUPTED": INTERRUPTED, "TRIES": TRIES}
  return {
    n: environment.get_template(f"{TEMPLATES.get(n, n)}{SUFFIX}").render(values)
    for n in sorted(names)
  }


def _with_image(job: PodJob) -> list[str]:
  """Returns the names of the files that start containers."""
  if job.hardware.platform == "gpu":
    return ["slurm.sbatch", "gpu_jobset.yaml"]
  return [] if _of_one_host(job.hardware) else ["gke_jobset.yaml"]


def _of_one_host(hardware: Hardware) -> bool:
  """Returns whether there are several slices of one host each, which GKE does not connect."""
  return hardware.platform == "tpu" and hardware.slices > 1 and hardware.hosts_per_slice == 1


def keys(job: PodJob) -> list[str]:
  """Returns a sentence for each written file that says how it gets the Weights & Biases key."""
  secret = job.secret or KUBERNETES_SECRET
  return [
    f"{name}: WANDB_API_KEY comes {KEYS[name].format(secret=secret)}."
    for name in files(job)
    if name in KEYS
  ]


def remarks(job: PodJob) -> list[str]:
  """Returns a sentence for each launcher whose file is not written, and for each ignored flag.

  An ignored flag is one that a written file does not support.
  """
  sentences, tpu = [], job.hardware.platform == "tpu"
  if _of_one_host(job.hardware):
    sentences.append("gke_jobset.yaml: GKE connects only slices of several hosts.")
  elif not job.image:
    sentences += [f"{name} needs a container image: give --image." for name in _with_image(job)]
  if tpu and not job.hardware.tpu.runtime:
    sentences.append(f"tpu_vm.sh: {job.hardware.chip} runs in GKE only.")
  if job.config.endswith(".py") and pathlib.PurePosixPath(job.config).parts[0] not in COPIED:
    sentences.append(
      f"--config={job.config}: launch/pod/Dockerfile and tpu_vm.sh copy only {', '.join(COPIED)}; "
      "put the file into ml_configs/, or have it in the image under this name."
    )
  return sentences + _ignored(job)


def _ignored(job: PodJob) -> list[str]:
  """Returns a sentence for each pair of a written file and a flag that it ignores."""
  is_cloud, others = job.has_cloud_account, ("queue", "secret")
  table = {
    "gke_jobset.yaml": ["service_account"] * is_cloud,
    "tpu_vm.sh": [*others, *["service_account"] * (not is_cloud), "priority", "cpus", "memory_gib"],
    "gpu_jobset.yaml": [*["service_account"] * is_cloud, "reservation", "spot"],
    "slurm.sbatch": [*others, "service_account", "spot"],
  }
  written = files(job)
  return [
    f"{name}: --{flag} changes nothing here."
    for name, ignored in table.items()
    if name in written
    for flag in ignored
    if getattr(job, flag)
  ]


def _environment() -> jinja2.Environment:
  folder = resources.files("cm3leon_jax.planning.launchers")
  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text()),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
  )
  environment.filters["quoted"] = json.dumps  # A JSON string is also a YAML string.
  environment.filters["words"] = words
  environment.filters["shell"] = shlex.quote
  # Kubernetes replaces $(NAME) by the value of a variable; $$( represents a literal $(.
  environment.filters["literal"] = lambda text: text.replace("$(", "$$(")
  return environment


def words(values: Sequence[str]) -> str:
  """Formats words for bash, one per line, quoted so that spaces, quotes and `$` are preserved."""
  return "".join(f"  {shlex.quote(value)}\n" for value in values)
