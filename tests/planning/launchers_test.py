"""Runs the scripts that `launch.plan` writes, with recorders in place of gcloud, xpk and srun."""

import hashlib
import re
import subprocess
import sys

import pytest
import yaml

from cm3leon_jax.config import INTERRUPTED
from tests.recorders import (
  CLUSTER,
  FLAGS,
  KEY,
  MISTAKE,
  POD,
  PROGRAMS,
  ROOT,
  Recorders,
  assert_one_sentence,
  run_script,
  write,
)  # fmt: skip

XPK = {**CLUSTER, "CLUSTER": "cluster"}
SLURM = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8"}


@pytest.fixture
def recorders(tmp_path):
  return Recorders(tmp_path)


# The written scripts.


@pytest.mark.parametrize(
  ("topology", "slices", "options"),
  [("v5e-256", 1, {}), ("v5p-256", 2, {"spot": True}), ("h100-64", 1, {}), ("v6e-8", 1, {})],
)
def test_written_scripts_are_clean(tmp_path, topology, slices, options):
  folder = write(tmp_path, topology, slices, **options)
  scripts = {path.name: path.read_text() for path in folder.glob("*.s*") if path.suffix != ".yaml"}
  if (folder / "skypilot.yaml").exists():
    task = yaml.safe_load((folder / "skypilot.yaml").read_text())
    scripts |= {name: "#!/usr/bin/env bash\n" + task[name] for name in ("setup", "run")}
  assert len(scripts) >= 2
  for name, text in scripts.items():
    (folder / name).write_text(text)
    # SC2016: flags with a `$` in single quotes are what this test is about.
    found = subprocess.run(
      [PROGRAMS / "shellcheck", "--exclude=SC2016", folder / name],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


def test_no_file_holds_a_secret_of_the_environment(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_API_KEY", KEY)
  for topology, queue in (("v5e-256", "q"), ("h100-64", "")):
    texts = [path.read_text() for path in write(tmp_path, topology, queue=queue).iterdir()]
    assert len(texts) >= 2
    assert all("WANDB_API_KEY" in text for text in texts if "kind: ResourceFlavor" not in text)
    assert not [text for text in texts if KEY in text]
    assert not [text for text in texts if re.search(r"WANDB_API_KEY[=:] *[\w'\"]{3}", text)]


# TPU VM.


def one_host(recorders):
  """Makes gcloud's machines this one: scp copies to its home, ssh runs the command there."""
  recorders.add(
    "gcloud",
    'case "$4" in scp) cp -p "$5" "$HOME/cm3leon_jax.tar.gz" ;;\n'
    'ssh) for a in "$@"; do case "$a" in\n'
    '--command=*) cd "$HOME" && exec bash -c "${a#--command=}" ;; esac; done ;; esac',
  )
  recorders.add(
    "sudo", 'case "$1" in tee) cat >>"$HOME/sudo_tee" ;; install) cp "$4" "$HOME/env" ;; esac'
  )
  recorders.add("systemctl", "echo inactive; exit 3")  # is-active: it is not.
  venv = recorders.home / "cm3leon_jax" / ".venv"
  (venv / "bin").mkdir(parents=True)
  (venv / "bin" / "python").symlink_to(sys.executable)
  files = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "requirements.txt").read_bytes()
  stamp = hashlib.sha256(files).hexdigest() + "\n"
  (venv / "installed-tpu,data,monitoring").write_text(stamp)
  return venv


def run_in_root(recorders, script, *arguments, **environment):
  command = f"cd {ROOT} && exec bash {script} {' '.join(arguments)}"
  return recorders.run("bash", "-c", command, environment=environment)


def test_tpu_vm_starts_the_same_flags_on_every_host(recorders, tmp_path):
  venv = one_host(recorders)
  script = write(tmp_path) / "tpu_vm.sh"
  result = run_in_root(recorders, script, "run", "--debug_nans", **CLUSTER, WANDB_API_KEY=KEY)
  assert result.returncode == 0, result.stderr
  asked, scp, ssh = recorders.calls("gcloud")
  assert scp[:4] == ["compute", "tpus", "tpu-vm", "scp"]
  assert asked[:5] == ssh[:5] == ["compute", "tpus", "tpu-vm", "ssh", "run"]
  for call in (asked, scp, ssh):
    assert {"--worker=all", "--project=project", "--zone=us-west4-a"} <= set(call)
  user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
  assert recorders.calls("sudo")[-1] == ["systemctl", "enable", "--now", f"cm3leon-train@{user}"]
  assert (recorders.home / "cm3leon_jax" / "cm3leon_jax" / "commands" / "train.py").exists()
  unit = (recorders.home / "sudo_tee").read_text()
  assert "\nTimeoutStopSec=1200\n" in unit
  assert "\nStartLimitBurst=7\n" in unit

  recorders.add("python")
  recorders.copy("python", venv / "bin" / "python")
  recorders.run("bash", "cm3leon_jax/train.sh")
  assert recorders.calls("python") == [
    ["-m", "launch.train", "--distributed", *FLAGS, "--debug_nans"]
  ]


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
def test_tpu_vm_replaces_no_file_of_a_run_that_trains(recorders, tmp_path, state):
  one_host(recorders)
  recorders.add("systemctl", f"echo {state}")
  result = run_in_root(recorders, write(tmp_path) / "tpu_vm.sh", "run", **CLUSTER)
  assert_one_sentence(result, "run is already training: run 'bash ")
  (call,) = recorders.calls("gcloud")
  assert "ssh" in call
  assert not (recorders.home / "cm3leon_jax" / "launch").exists()


def test_tpu_vm_copies_nothing_if_a_host_does_not_answer(recorders, tmp_path):
  recorders.add("gcloud", "exit 255")
  result = run_in_root(recorders, write(tmp_path) / "tpu_vm.sh", "run", **CLUSTER)
  assert result.returncode == 255
  assert len(recorders.calls("gcloud")) == 1


def test_tpu_vm_brings_the_key_to_a_file_of_root(recorders, tmp_path):
  one_host(recorders)
  script = write(tmp_path) / "tpu_vm.sh"
  assert run_in_root(recorders, script, "run", **CLUSTER, WANDB_API_KEY=KEY).returncode == 0
  user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
  (install,) = [call for call in recorders.calls("sudo") if call[0] == "install"]
  assert install[1:3] == ["-D", "--mode=600"]
  assert install[4] == f"/etc/cm3leon-train/{user}.env"
  assert (recorders.home / "env").read_text() == f"WANDB_API_KEY={KEY}\n"
  unit = (POD / "cm3leon-train@.service").read_text()
  assert "\nEnvironmentFile=-/etc/cm3leon-train/%i.env\n" in unit
  # Nothing that others can read keeps it: no argument, no file.
  assert not [call for call in recorders.calls("gcloud") if KEY in " ".join(call)]
  kept = [p for p in recorders.home.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
  assert kept == [recorders.home / "env"]
  assert not (recorders.home / "cm3leon_jax.tar.gz").exists()


def test_tpu_vm_refuses_what_is_no_key(recorders, tmp_path):
  one_host(recorders)
  script = write(tmp_path) / "tpu_vm.sh"
  result = run_in_root(recorders, script, "run", **CLUSTER, WANDB_API_KEY="a'b c")
  assert_one_sentence(result, "WANDB_API_KEY has characters that no key has.")
  assert recorders.calls("gcloud") == []


SSH = ["tpu-vm", "ssh", "run"]
JOURNAL = "sudo journalctl --unit=cm3leon-train@$USER --lines=100 --follow"
CREATE = ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"]


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (
      ["create", "--reserved"],
      ["queued-resources", "create", "run", "--node-id=run", *CREATE, "--reserved"],
    ),
    (["state"], ["queued-resources", "describe", "run", "--format=value(state.state)"]),
    (
      ["status"],
      [*SSH, "--worker=all", "--command=hostname; systemctl is-active cm3leon-train@$USER || true"],
    ),
    (["logs"], [*SSH, "--worker=0", f"--command={JOURNAL}"]),
    (["logs", "5"], [*SSH, "--worker=5", f"--command={JOURNAL}"]),
    (
      ["stop"],
      [*SSH, "--worker=all", "--command=sudo systemctl disable --now cm3leon-train@$USER"],
    ),
    (["delete"], ["queued-resources", "delete", "run", "--force"]),
  ],
)
def test_tpu_vm_commands(recorders, tmp_path, arguments, expected):
  recorders.add("gcloud")
  script = write(tmp_path) / "tpu_vm.sh"
  assert run_script(recorders, script, *arguments, **CLUSTER).returncode == 0
  end = ["--project=project", "--zone=us-west4-a"]
  assert recorders.calls("gcloud") == [["compute", "tpus", *expected, *end]]


def test_tpu_vm_asks_for_spot_slices_and_reaches_each(recorders, tmp_path):
  recorders.add("gcloud")
  script = write(tmp_path, "v5p-256", 2, spot=True) / "tpu_vm.sh"
  assert run_script(recorders, script, "create", **CLUSTER).returncode == 0
  assert {
    "--node-count=2", "--node-prefix=run", "--accelerator-type=v5p-256", "--spot",
  } <= set(recorders.calls("gcloud")[0])  # fmt: skip
  assert run_script(recorders, script, "stop", **CLUSTER).returncode == 0
  assert sorted(call[4] for call in recorders.calls("gcloud")[1:]) == ["run-0", "run-1"]


def test_tpu_vm_watch_asks_again_after_a_preemption_and_ends_with_the_training(recorders, tmp_path):
  """States: it waits, is made, trains, is preempted, is made again, trains, is done.

  The tries that fail are counted from the last slice that was made.
  """
  states = ["FAILED", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED"]
  states += ["FAILED"] * 4 + ["PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE"]
  services = ["inactive", "active", "inactive", "active", "inactive"]
  for name, lines in (("states", states), ("services", services)):
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
  pop = f'next() {{ head -n 1 "{tmp_path}/$1"; sed -i 1d "{tmp_path}/$1"; }}\n'
  recorders.add(
    "gcloud",
    pop + 'case "$*" in *" describe "*state.state*) next states ;;\n'
    '*"--worker=0"*is-active*) next services ;; esac',
  )
  script = write(tmp_path, spot=True) / "tpu_vm.sh"
  result = run_in_root(recorders, script, "watch", "--reserved", **CLUSTER, WATCH_SECONDS="0")
  assert result.returncode == 0, result.stderr
  assert "training has ended" in result.stdout
  calls = [" ".join(call[2:5]) for call in recorders.calls("gcloud")]
  made = [c for c in calls if c.startswith(("queued-resources create", "queued-resources delete"))]
  assert made == ["queued-resources delete run", "queued-resources create run"] * 6
  created = [call for call in recorders.calls("gcloud") if call[3] == "create"]
  assert all({"--spot", "--reserved"} <= set(call) for call in created)
  assert sum(call.startswith("tpu-vm scp") for call in calls) == 2
  assert (tmp_path / "states").read_text() == (tmp_path / "services").read_text() == ""


def test_tpu_vm_watch_stops_if_the_request_fails_again_and_again(recorders, tmp_path):
  recorders.add(
    "gcloud",
    'case "$*" in *failedData*) echo "Quota exceeded." ;; *" describe "*) echo FAILED ;; esac',
  )
  script = write(tmp_path) / "tpu_vm.sh"
  result = run_script(recorders, script, "watch", **CLUSTER, WATCH_SECONDS="0")
  assert result.returncode == MISTAKE
  assert result.stdout.count("run could not be made: Quota exceeded.\n") == 5
  assert result.stderr.startswith("error: run FAILED 5 times: see the reason above; ")
  assert [call[3] for call in recorders.calls("gcloud")].count("create") == 4


def test_tpu_vm_watch_needs_a_request(recorders, tmp_path):
  recorders.add("gcloud", "exit 1")
  script = write(tmp_path) / "tpu_vm.sh"
  result = run_script(recorders, script, "watch", **CLUSTER, WATCH_SECONDS="0")
  assert_one_sentence(result, "gcloud does not find the queued resource run: run 'bash ")


# XPK.


def test_xpk_gets_the_flags_whole(recorders, tmp_path):
  recorders.add("xpk")
  recorders.add("python")
  script = write(tmp_path, slices=2) / "xpk.sh"
  result = run_script(recorders, script, **XPK)
  assert result.returncode == 0, result.stderr
  (call,) = recorders.calls("xpk")
  assert call[:2] == ["workload", "create"]
  given = dict(argument.removeprefix("--").split("=", 1) for argument in call[2:])
  restarted = {int(code) for code in given.pop("restart-on-exit-codes").split(",")}
  command = given.pop("command")
  assert given == {
    "project": "project", "zone": "us-west4-a", "cluster": "cluster", "workload": "run",
    "tpu-type": "v5litepod-256", "num-slices": "2", "docker-image": "registry#image:tag",
    "max-restarts": "7", "termination-grace-period-seconds": "1200",
  }  # fmt: skip
  assert INTERRUPTED in restarted
  assert MISTAKE not in restarted
  recorders.run("bash", "-c", command)
  assert recorders.calls("python") == [["-m", "launch.train", "--distributed", *FLAGS]]


@pytest.mark.parametrize("readable", [True, False])
def test_xpk_reads_the_key_in_the_container(recorders, tmp_path, readable):
  secret, found = "projects/p/secrets/wandb", tmp_path / "found"
  answer = f"{{ printf %s {KEY}; exit; }}" if readable else "exit 1"
  recorders.add("xpk")
  recorders.add(
    "python",
    f'[ "$2" != launch.pod.secret ] || {answer}\necho "${{WANDB_API_KEY-absent}}" >{found}',
  )
  script = write(tmp_path) / "xpk.sh"
  result = run_script(recorders, script, **XPK, WANDB_SECRET=secret, WANDB_API_KEY=KEY)
  assert result.returncode == 0
  (call,) = recorders.calls("xpk")
  assert KEY not in " ".join(call)
  command = next(argument for argument in call if argument.startswith("--command="))
  recorders.run("bash", "-c", command.removeprefix("--command="))
  read, trained = recorders.calls("python")
  assert read == ["-m", "launch.pod.secret", secret]
  assert trained == ["-m", "launch.train", "--distributed", *FLAGS]  # With the key or without.
  assert found.read_text().strip() == (KEY if readable else "absent")


# SLURM.


def submit(recorders, tmp_path, status, *arguments, **environment):
  recorders.add("srun", f'echo "${{WANDB_API_KEY-absent}}"; exit {status}')
  recorders.add("scontrol")
  script = write(tmp_path, "h100-64") / "slurm.sbatch"
  return run_script(recorders, script, *arguments, **SLURM, **environment)


def test_slurm_gets_the_flags_whole_and_the_key(recorders, tmp_path):
  mounts = "/scratch:/scratch,/home/a b:/home"
  result = submit(recorders, tmp_path, 0, "--debug_nans", MOUNTS=mounts, WANDB_API_KEY=KEY)
  assert result.returncode == 0
  assert result.stdout == f"{KEY}\n"
  (call,) = recorders.calls("srun")
  at = call.index("python")
  assert call[at:] == ["python", "-m", "launch.train", "--distributed", *FLAGS, "--debug_nans"]
  assert {"--container-image=registry#image:tag", f"--container-mounts={mounts}"} <= set(call[:at])
  assert recorders.calls("scontrol") == []


@pytest.mark.parametrize(
  ("status", "crashes", "again", "left"),
  [
    (0, 0, False, 0),
    (0, 3, False, 0),
    (MISTAKE, 0, False, 0),
    (INTERRUPTED, 0, True, 0),
    (INTERRUPTED, 99, True, 99),
    (1, 0, True, 1),
    (1, 6, True, 7),
    (137, 7, False, 8),
  ],
)
def test_slurm_requeues_an_interrupted_run_but_not_after_a_mistake(
  recorders, tmp_path, status, crashes, again, left
):
  """SLURM counts time limits and preemptions too: only the crashes of the job's file count."""
  counted = recorders.home / "cm3leon-17.crashes"
  if crashes:
    counted.write_text("2026-01-01T00:00:00 exit code 1\n" * crashes)
  result = submit(recorders, tmp_path, status, SLURM_RESTART_COUNT="99")
  assert recorders.calls("scontrol") == ([["requeue", "17"]] if again else [])
  assert result.returncode == (0 if again else status)
  lines = counted.read_text().splitlines() if counted.exists() else []
  assert len(lines) == left
  if left > crashes:
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT[\d:]{{8}} exit code {status}", lines[-1])


def test_slurm_knows_every_option_and_sends_sigterm_before_the_time_limit(tmp_path):
  text = (write(tmp_path, "h100-64") / "slurm.sbatch").read_text()
  options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
  # Of sbatch's manual.
  assert options.keys() == {
    "job-name", "nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "mem", "exclusive",
    "time", "output", "open-mode", "requeue", "signal", "export",
  }  # fmt: skip
  assert options["signal"] == "TERM@1200"
  assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == ("8",) * 3


# SkyPilot.


@pytest.mark.parametrize(
  ("statuses", "runs", "code"),
  [
    ([0], 1, 0),
    ([MISTAKE], 1, MISTAKE),
    ([INTERRUPTED, 1, 0], 3, 0),
    ([INTERRUPTED] * 9 + [0], 10, 0),
    ([1] * 9, 8, 1),  # The first start, and seven more.
  ],
)
def test_skypilot_restarts_an_interrupted_run_but_not_after_a_mistake(
  recorders, tmp_path, statuses, runs, code
):
  (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
  recorders.add(
    "python",
    f'status=$(head -n 1 "{tmp_path}/statuses"); sed -i 1d "{tmp_path}/statuses"; exit "$status"',
  )
  bin_folder = recorders.home / ".venv" / "bin"
  bin_folder.mkdir(parents=True)
  (bin_folder / "python").touch()
  recorders.copy("python", bin_folder / "python")
  task = yaml.safe_load((write(tmp_path, "h100-64") / "skypilot.yaml").read_text())
  environment = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1", "RESTART_SECONDS": "0", "WANDB_API_KEY": "",
  }  # fmt: skip
  result = recorders.run("bash", "-c", task["run"], environment=environment)
  assert result.returncode == code
  calls = recorders.calls("python")
  joined = ["--coordinator_address=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
  assert calls == [["-m", "launch.train", *FLAGS, *joined]] * runs


# Mistakes.


@pytest.mark.parametrize(
  ("script", "variable"),
  [("tpu_vm.sh", "PROJECT"), ("tpu_vm.sh", "ZONE")]
  + [("xpk.sh", variable) for variable in ("PROJECT", "ZONE", "CLUSTER")],
)
def test_a_missing_variable_is_reported_in_one_sentence(recorders, tmp_path, script, variable):
  environment = {name: value for name, value in XPK.items() if name != variable}
  arguments = ["run"] if script == "tpu_vm.sh" else []
  result = run_script(recorders, write(tmp_path) / script, *arguments, **environment)
  assert_one_sentence(result, f"{variable} is not set: export it, as in {variable}=")


@pytest.mark.parametrize(
  ("arguments", "start"),
  [([], "no command; usage: "), (["start"], "unexpected command 'start'; usage: ")],
)
def test_tpu_vm_commands_are_checked(recorders, tmp_path, arguments, start):
  result = run_script(recorders, write(tmp_path) / "tpu_vm.sh", *arguments, **CLUSTER)
  assert_one_sentence(result, start)


def test_tpu_vm_needs_the_repository(recorders, tmp_path):
  result = run_script(recorders, write(tmp_path) / "tpu_vm.sh", "run", **CLUSTER)
  assert_one_sentence(result, "launch/pod/tpu_host.sh is not here: run ")
