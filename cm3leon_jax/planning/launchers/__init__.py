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

from cm3leon_jax.config import INTERRUPTED, UserError
from cm3leon_jax.planning.hardware import GPU_FRACTION, Hardware

MISTAKE = UserError.exit_code
SUFFIX = ".jinja"
TRIES = 5  # Number of attempts to create TPU VMs.
KUBERNETES_SECRET = "cm3leon"
# Maps a file to how the processes that it starts get the Weights & Biases key.
KEYS = {
  "gke_jobset.yaml": "from a Secret: kubectl create secret generic {secret} "
  '--from-literal=WANDB_API_KEY="$WANDB_API_KEY"',
  "xpk.sh": "from Secret Manager: export WANDB_SECRET=projects/PROJECT/secrets/NAME",
  "tpu_vm.sh": "from the environment of tpu_vm.sh, at `watch` and `run`",
  "slurm.sbatch": "from the environment of sbatch",
}
# Priorities that XPK accepts, which are PriorityClasses of its clusters.
XPK_PRIORITIES = ("very-low", "low", "medium", "high", "very-high")
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
  _check_names(job, gpu)
  if job.queue and gpu:
    raise UserError("--queue is for Kueue, which only the files for TPUs use: omit it on GPUs.")
  if job.secret and gpu:
    raise UserError(
      "--secret is for Kubernetes, which only the files for TPUs use: omit it on GPUs, where "
      "WANDB_API_KEY comes from the environment of sbatch."
    )
  _check_gke(job)
  where = "gs://BUCKET/FOLDER" + (" or /SHARED/FOLDER" * gpu)
  if not job.workdir:
    raise UserError(f"--out needs --workdir={where}, because all hosts use one workdir.")
  if not re.match(r"(gs://|/)." if gpu else "gs://.", job.workdir):
    raise UserError(
      f"--workdir is '{job.workdir}'; it must be {where}, because all hosts use one workdir."
    )


def _check_names(job: PodJob, gpu: bool) -> None:
  """Raises UserError if a name is invalid, or if a flag does not apply to the job's machines."""
  names = {"queue": job.queue, "secret": job.secret}
  if not gpu:
    names |= {"priority": job.priority}
  if not job.has_cloud_account:
    names |= {"service_account": job.service_account}
  for flag, value in names.items():
    if value and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", value):
      raise UserError(
        f"--{flag} is '{value}'; it must be a Kubernetes name (lower-case letters, digits, '-' and "
        "'.')."
      )
  for flag, value in (("reservation", job.reservation), ("priority", job.priority)):
    if value and not re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", value, re.ASCII):
      raise UserError(f"--{flag} is '{value}'; it must consist of letters, digits and hyphens.")
  account = job.service_account
  if job.has_cloud_account and not re.fullmatch(r"[\w.-]+@[\w.-]+", account, re.ASCII):
    raise UserError(
      f"--service_account is '{account}'; it must be a Kubernetes name, or an address such as "
      "trainer@my-project.iam.gserviceaccount.com."
    )
  if account and gpu:
    raise UserError(
      "--service_account is for GKE and TPU VMs: omit it on GPUs, whose launchers use the account "
      "of their machines."
    )
  if job.reservation and job.spot:
    raise UserError("--reservation and --spot exclude each other: give only one.")


def _check_gke(job: PodJob) -> None:
  """Raises UserError for a flag that only GKE files use if no GKE file is written."""
  for flag, value in (("queue", job.queue), ("secret", job.secret)):
    if value and _of_one_host(job.hardware):
      raise UserError(
        f"--{flag} is for gke_jobset.yaml, which is not written because GKE connects only slices "
        f"of several hosts: omit --{flag}."
      )
    if value and not job.image:
      raise UserError(
        f"--{flag} is for gke_jobset.yaml, which is written only with --image: give --image, or "
        f"omit --{flag}."
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
  values |= {"XPK_PRIORITIES": XPK_PRIORITIES}
  return {
    name: environment.get_template(f"{name}{SUFFIX}").render(values) for name in sorted(names)
  }


def _with_image(job: PodJob) -> list[str]:
  """Returns the names of the files that start containers."""
  if job.hardware.platform == "gpu":
    return ["slurm.sbatch"]
  if _of_one_host(job.hardware):
    return []
  names = ["gke_jobset.yaml", "xpk.sh"]
  return sorted([*names, *["gke_monitoring.yaml"] * bool(job.metrics_port)])


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
  sentences, gpu = [], job.hardware.platform == "gpu"
  if _of_one_host(job.hardware):
    sentences.append("gke_jobset.yaml and xpk.sh: GKE connects only slices of several hosts.")
  elif not job.image:
    *others, last = _with_image(job)
    needing = f"{', '.join(others)} and {last} need" if others else f"{last} needs"
    sentences.append(f"{needing} a container image: give --image.")
  elif gpu and job.spot:
    sentences.append("slurm.sbatch: --spot changes nothing in SLURM: choose a partition.")
  if not gpu and not job.hardware.tpu.runtime:
    sentences.append(f"tpu_vm.sh: {job.hardware.chip} runs in GKE only.")
  if job.config.endswith(".py") and pathlib.PurePosixPath(job.config).parts[0] not in COPIED:
    sentences.append(
      f"--config={job.config}: launch/pod/Dockerfile and tpu_vm.sh copy only {', '.join(COPIED)}; "
      "put the file into ml_configs/, or have it in the image under this name."
    )
  return sentences + _not_followed(job)


def _not_followed(job: PodJob) -> list[str]:
  """Returns a sentence for each pair of a written file and a flag that it ignores."""
  account = "--service_account" if job.service_account else ""
  priority = "--priority" if job.priority else ""
  machine = "--cpus" if job.cpus else "--memory_gib" if job.memory_gib else ""
  is_cloud = job.has_cloud_account
  table = {
    "gke_jobset.yaml": {account * is_cloud: "give the node pool this account"},
    "xpk.sh": {
      account: "XPK has no flag for it",
      priority * (job.priority not in XPK_PRIORITIES): f"XPK has {', '.join(XPK_PRIORITIES)}",
      machine: "XPK has no flag for it",
    },
    "tpu_vm.sh": {
      account * (not is_cloud): "give an address of Google Cloud",
      priority: "a queued resource has none",
      machine: "a TPU VM is a whole host",
    },
  }
  written = files(job)
  return [
    f"{name}: {flag} changes nothing here: {reason}."
    for name, row in table.items()
    if name in written
    for flag, reason in row.items()
    if flag
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
