"""Lints the files of launch/pod, and runs them with recorders in place of gcloud, xpk and srun."""

import configparser
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

from cm3leon_jax.training.train import INTERRUPTED

ROOT = pathlib.Path(__file__).parents[2]
POD = ROOT / "launch" / "pod"
# shellcheck and hadolint are Python packages.
PROGRAMS = pathlib.Path(sysconfig.get_path("scripts"))
PATTERNS = (".ci/run", "launch/**/*.sh", "launch/**/*.sbatch")
SCRIPTS = sorted(p for pattern in PATTERNS for p in ROOT.glob(pattern) if p.is_file())
MISTAKE = 2  # Exit code of every command for a user's mistake.
FLAGS = [
  "--config=ml_configs/cm3leon_7b.py:paper",
  "--workdir=gs://bucket/7b",
  "--config.raw.source=a b/it's {0..9}$(id)*\"$HOME",
]
CLUSTER = {"PROJECT": "project", "ZONE": "us-west4-a"}
TPU_VM = {**CLUSTER, "TPU": "pod", "ACCELERATOR": "v5litepod-256", "RUNTIME": "v2-alpha-tpuv5-lite"}
XPK = {**CLUSTER, "CLUSTER": "cluster", "NAME": "run"}
XPK |= {"TPU_TYPE": "v5litepod-256", "IMAGE": "image:root"}
GKE = {"NAME": "run", "IMAGE": "image:tpu"}
GKE |= {"ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "16x16"}
SLURM = {"IMAGE": "registry#image:gpu", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8"}


class Recorders:
  """Programs on PATH that record their calls."""

  def __init__(self, folder: pathlib.Path):
    self.home, self._programs, self._log = folder / "home", folder / "programs", folder / "log"
    self.home.mkdir()
    self._programs.mkdir()

  def add(self, name: str, then: str = "") -> None:
    """Adds a program that records its call and then runs the bash code `then`."""
    program = self._programs / name
    record = f"printf '%s\\037' '{name}' \"$@\" >>'{self._log}'\nprintf '\\n' >>'{self._log}'"
    program.write_text(f"#!/usr/bin/env bash\n{record}\n{then}\n")
    program.chmod(0o755)

  def copy(self, name: str, path: pathlib.Path) -> None:
    """Replaces the file at `path` with a program."""
    path.unlink()
    shutil.copy(self._programs / name, path)

  def calls(self, name: str) -> list[list[str]]:
    """Returns the arguments of each call of a program, in order."""
    lines = self._log.read_text().splitlines() if self._log.exists() else []
    return [call[1:] for call in (line.split("\037")[:-1] for line in lines) if call[0] == name]

  def run(self, *argv, environment=None):
    path = f"{self._programs}:{os.environ['PATH']}"
    variables = {
      "HOME": str(self.home),
      "PATH": path,
      "TMPDIR": str(self.home),
      "PYTHONPATH": str(ROOT),
      **(environment or {}),
    }
    return subprocess.run(
      argv, cwd=self.home, capture_output=True, text=True, timeout=60, env=variables, check=False
    )


@pytest.fixture
def recorders(tmp_path):
  return Recorders(tmp_path)


def run_script(recorders, name, flags, environment):
  if name == "gke_jobset":
    return recorders.run(
      sys.executable, "-m", "launch.pod.gke_jobset", *flags, environment=environment
    )
  return recorders.run("bash", str(POD / name), *flags, environment=environment)


# Lint.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_clean(script):
  assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
  found = subprocess.run(
    [PROGRAMS / "shellcheck", "--external-sources", script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 0, found.stdout


def test_shellcheck_finds_an_unquoted_variable(tmp_path):
  (tmp_path / "wrong.sh").write_text("#!/usr/bin/env bash\nrm $1\n")
  found = subprocess.run(
    [PROGRAMS / "shellcheck", tmp_path / "wrong.sh"], capture_output=True, text=True, check=False
  )
  assert found.returncode == 1
  assert "SC2086" in found.stdout


def test_dockerfile_is_clean():
  found = subprocess.run(
    [PROGRAMS / "hadolint", POD / "Dockerfile"], capture_output=True, text=True, check=False
  )
  assert found.returncode == 0, found.stdout


def test_hadolint_finds_a_misspelt_instruction(tmp_path):
  (tmp_path / "Dockerfile").write_text(
    (POD / "Dockerfile").read_text().replace("WORKDIR", "WORKDIRS")
  )
  assert (
    subprocess.run(
      [PROGRAMS / "hadolint", tmp_path / "Dockerfile"], capture_output=True, check=False
    ).returncode
    != 0
  )


def test_dockerfile_copies_what_the_context_holds_and_installs_extras_that_exist():
  text, ignored = (
    (POD / "Dockerfile").read_text(),
    (ROOT / ".dockerignore").read_text().splitlines(),
  )
  copied = [
    source
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE)
    for source in line.split()[:-1]
  ]
  assert copied
  assert all((ROOT / source).exists() for source in copied)
  assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied)
  assert 'case "$EXTRA" in tpu | cuda12 | cuda13)' in text
  # tests/packaging_test.py: .ci/extras.py resolves all three.
  assert '".[$EXTRA,data,monitoring]"' in text


# TPU VM.


def test_tpu_vm_starts_the_same_flags_on_every_host(recorders):
  """Here gcloud has one host: scp copies to its home, ssh runs the command there."""
  recorders.add(
    "gcloud",
    'case "$4" in scp) cp "$5" "$HOME/cm3leon_jax.tar.gz" ;;\n'
    'ssh) for a in "$@"; do case "$a" in\n'
    '--command=*) cd "$HOME" && exec bash -c "${a#--command=}" ;; esac; done ;; esac',
  )
  recorders.add("sudo")
  recorders.add("systemctl", "exit 3")  # is-active: it is not.
  venv = recorders.home / "cm3leon_jax" / ".venv"
  (venv / "bin").mkdir(parents=True)
  (venv / "bin" / "python").symlink_to(sys.executable)
  files = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "requirements.txt").read_bytes()
  (venv / "installed-tpu,data,monitoring").write_text(hashlib.sha256(files).hexdigest() + "\n")
  result = run_script(recorders, "tpu_vm.sh", ["run", *FLAGS], TPU_VM)
  assert result.returncode == 0, result.stderr
  scp, ssh = recorders.calls("gcloud")
  assert scp[:4] == ["compute", "tpus", "tpu-vm", "scp"]
  assert ssh[:5] == ["compute", "tpus", "tpu-vm", "ssh", "pod"]
  for call in (scp, ssh):
    assert {"--worker=all", "--project=project", "--zone=us-west4-a"} <= set(call)
  user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
  assert recorders.calls("sudo")[-1] == ["systemctl", "enable", "--now", f"cm3leon-train@{user}"]
  assert (recorders.home / "cm3leon_jax" / "cm3leon_jax" / "commands" / "train.py").exists()

  recorders.add("python")
  recorders.copy("python", venv / "bin" / "python")
  recorders.run("bash", "cm3leon_jax/train.sh")
  assert recorders.calls("python") == [["-m", "launch.train", "--distributed", *FLAGS]]


def test_tpu_vm_host_that_trains_is_left_alone(recorders):
  recorders.add("systemctl")
  result = run_script(recorders, "tpu_host.sh", FLAGS, {})
  assert result.returncode == MISTAKE
  assert result.stderr.endswith(
    " is already training: run 'bash launch/pod/tpu_vm.sh stop' first.\n"
  )


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (
      ["create", "--spot"],
      [
        "create",
        "pod",
        "--accelerator-type=v5litepod-256",
        "--version=v2-alpha-tpuv5-lite",
        "--spot",
      ],
    ),
    (
      ["status"],
      [
        "ssh",
        "pod",
        "--worker=all",
        "--command=hostname; systemctl is-active cm3leon-train@$USER || true",
      ],
    ),
    (
      ["logs"],
      [
        "ssh",
        "pod",
        "--worker=0",
        "--command=sudo journalctl --unit=cm3leon-train@$USER --lines=100 --follow",
      ],
    ),
    (
      ["logs", "5"],
      [
        "ssh",
        "pod",
        "--worker=5",
        "--command=sudo journalctl --unit=cm3leon-train@$USER --lines=100 --follow",
      ],
    ),
    (
      ["stop"],
      ["ssh", "pod", "--worker=all", "--command=sudo systemctl disable --now cm3leon-train@$USER"],
    ),
    (["delete"], ["delete", "pod"]),
  ],
)
def test_tpu_vm_commands(recorders, arguments, expected):
  recorders.add("gcloud")
  assert run_script(recorders, "tpu_vm.sh", arguments, TPU_VM).returncode == 0
  assert recorders.calls("gcloud") == [
    ["compute", "tpus", "tpu-vm", *expected, "--project=project", "--zone=us-west4-a"]
  ]


def test_tpu_vm_service_restarts_an_interrupted_run_but_not_after_a_mistake():
  unit = configparser.ConfigParser(interpolation=None)
  unit.optionxform = str
  unit.read(POD / "cm3leon-train@.service")
  service = unit["Service"]
  assert service["Restart"] == "on-failure"
  assert service["RestartForceExitStatus"] == service["SuccessExitStatus"] == str(INTERRUPTED)
  assert service["RestartPreventExitStatus"] == str(MISTAKE)
  assert unit["Unit"]["StartLimitBurst"] == "20"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_knows_every_line_of_the_service(tmp_path):
  def analyze(path):
    command = ["systemd-analyze", "verify", path]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr

  good, wrong = tmp_path / "cm3leon-train@good.service", tmp_path / "cm3leon-train@wrong.service"
  text = (POD / "cm3leon-train@.service").read_text().replace("User=%i", "User=root")
  good.write_text(text)
  wrong.write_text(text.replace("RestartPreventExitStatus", "RestartPreventsExitStatus"))
  assert good.name not in analyze(good)
  assert "RestartPreventsExitStatus" in analyze(wrong)


# XPK.


def test_xpk_gets_the_flags_whole(recorders):
  recorders.add("xpk")
  recorders.add("python")
  result = run_script(recorders, "xpk.sh", FLAGS, {**XPK, "SLICES": "2"})
  assert result.returncode == 0, result.stderr
  (call,) = recorders.calls("xpk")
  assert call[:2] == ["workload", "create"]
  given = dict(argument.removeprefix("--").split("=", 1) for argument in call[2:])
  assert {
    name: given[name]
    for name in ("project", "cluster", "workload", "tpu-type", "num-slices", "docker-image")
  } == {
    "project": "project",
    "cluster": "cluster",
    "workload": "run",
    "tpu-type": "v5litepod-256",
    "num-slices": "2",
    "docker-image": "image:root",
  }
  restarted = {int(code) for code in given["restart-on-exit-codes"].split(",")}
  assert INTERRUPTED in restarted
  assert MISTAKE not in restarted
  recorders.run("bash", "-c", given["command"])
  assert recorders.calls("python") == [["-m", "launch.train", "--distributed", *FLAGS]]


# SLURM.


def submit(recorders, status, **environment):
  recorders.add("srun", f"exit {status}")
  recorders.add("scontrol")
  return run_script(recorders, "slurm_gpu.sbatch", FLAGS, {**SLURM, **environment})


def test_slurm_gets_the_flags_whole(recorders):
  assert submit(recorders, 0, MOUNTS="/scratch:/scratch,/home/a b:/home").returncode == 0
  (call,) = recorders.calls("srun")
  at = call.index("python")
  assert call[at:] == ["python", "-m", "launch.train", "--distributed", *FLAGS]
  assert {
    "--container-image=registry#image:gpu",
    "--container-mounts=/scratch:/scratch,/home/a b:/home",
  } <= set(call[:at])
  assert recorders.calls("scontrol") == []


@pytest.mark.parametrize(
  ("status", "restarts", "again"),
  [
    (0, 0, False),
    (MISTAKE, 0, False),
    (INTERRUPTED, 0, True),
    (INTERRUPTED, 99, True),
    (1, 19, True),
    (137, 20, False),
  ],
)
def test_slurm_requeues_an_interrupted_run_but_not_after_a_mistake(
  recorders, status, restarts, again
):
  result = submit(recorders, status, SLURM_RESTART_COUNT=str(restarts))
  assert recorders.calls("scontrol") == ([["requeue", "17"]] if again else [])
  assert result.returncode == (0 if again else status)


def test_slurm_sends_sigterm_before_the_time_limit():
  options = dict(
    re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (POD / "slurm_gpu.sbatch").read_text(), re.MULTILINE)
  )
  assert options["signal"] == "TERM@900"
  assert "requeue" in options
  assert options["gpus-per-node"] == options["ntasks-per-node"]


# Mistakes.

NEEDED = {
  "tpu_vm.sh": (["run", *FLAGS], {name: TPU_VM[name] for name in ("PROJECT", "ZONE", "TPU")}),
  "xpk.sh": (FLAGS, XPK),
  "gke_jobset": (FLAGS, GKE),
  "slurm_gpu.sbatch": (FLAGS, {"IMAGE": SLURM["IMAGE"]}),
}


def assert_one_sentence(result, start):
  assert result.returncode == MISTAKE
  assert result.stderr.startswith(f"error: {start}")
  assert result.stderr.count("\n") == 1
  assert result.stdout == ""


@pytest.mark.parametrize(
  ("script", "variable"),
  [(script, name) for script, (_, names) in NEEDED.items() for name in names],
)
def test_a_missing_variable_is_reported_in_one_sentence(recorders, script, variable):
  flags, environment = NEEDED[script]
  environment = {name: value for name, value in environment.items() if name != variable}
  assert_one_sentence(
    run_script(recorders, script, flags, environment),
    f"{variable} is not set: export it, as in {variable}=",
  )


@pytest.mark.parametrize("flag", ["--config", "--workdir"])
@pytest.mark.parametrize("script", NEEDED)
def test_a_missing_flag_is_reported_in_one_sentence(recorders, script, flag):
  flags, environment = NEEDED[script]
  flags = [f for f in flags if not f.startswith(f"{flag}=")]
  assert_one_sentence(run_script(recorders, script, flags, environment), f"the flag {flag}=")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "gke_jobset"])
def test_a_workdir_of_one_host_is_refused(recorders, script):
  flags, environment = NEEDED[script]
  flags = [re.sub("^--workdir=.*", "--workdir=runs/7b", flag) for flag in flags]
  assert_one_sentence(
    run_script(recorders, script, flags, environment),
    "the flag --workdir=gs://BUCKET/FOLDER is missing: ",
  )


@pytest.mark.parametrize(
  ("variables", "sentence"),
  [
    (
      {"TOPOLOGY": "256"},
      "TOPOLOGY is '256'; it must be the chips along each axis, as in 16x16 or 4x4x8.",
    ),
    (
      {"CHIPS_PER_HOST": "3"},
      "CHIPS_PER_HOST is 3; it does not divide the 256 chips of TOPOLOGY=16x16.",
    ),
    ({"SLICES": "two"}, "SLICES is 'two'; it must be a positive whole number."),
  ],
)
def test_gke_values_are_checked(recorders, variables, sentence):
  assert_one_sentence(run_script(recorders, "gke_jobset", FLAGS, {**GKE, **variables}), sentence)


@pytest.mark.parametrize(
  ("arguments", "start"),
  [([], "no command; usage: "), (["start"], "unexpected command 'start'; usage: ")],
)
def test_tpu_vm_commands_are_checked(recorders, arguments, start):
  assert_one_sentence(run_script(recorders, "tpu_vm.sh", arguments, TPU_VM), start)
