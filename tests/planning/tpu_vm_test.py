import hashlib
import os
import pwd
import sys

import pytest

from tests.recorders import (
  CLUSTER,
  FLAGS,
  KEY,
  MISTAKE,
  POD,
  ROOT,
  Recorders,
  assert_one_sentence,
  run_script,
  write,
)

USER = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture
def recorders(tmp_path):
  return Recorders(tmp_path)


def one_host(recorders):
  """Fakes gcloud with this machine as host: scp copies to its home, ssh runs commands on it."""
  recorders.add(
    "gcloud",
    'case "$4" in scp) cp -p "$5" "$HOME/cm3leon_jax.tar.gz" ;;\n'
    'ssh) for a in "$@"; do case "$a" in\n'
    '--command=*) cd "$HOME" && exec bash -c "${a#--command=}" ;; esac; done ;; esac',
  )
  recorders.add(
    "sudo", 'case "$1" in tee) cat >>"$HOME/sudo_tee" ;; install) cp "$4" "$HOME/env" ;; esac'
  )
  recorders.add("systemctl", "echo inactive; exit 3")  # is-active fails.
  venv = recorders.home / "cm3leon_jax" / ".venv"
  (venv / "bin").mkdir(parents=True)
  (venv / "bin" / "python").symlink_to(sys.executable)
  names = ("pyproject.toml", "requirements.txt", "constraints.txt")  # The list in launch/venv.sh.
  stamp = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest() + "\n"
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
  assert recorders.calls("sudo")[-1] == ["systemctl", "enable", "--now", f"cm3leon-train@{USER}"]
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


@pytest.mark.slow
@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
def test_tpu_vm_replaces_no_file_of_a_run_that_trains(recorders, tmp_path, state):
  one_host(recorders)
  recorders.add("systemctl", f"echo {state}")
  result = run_in_root(recorders, write(tmp_path) / "tpu_vm.sh", "run", **CLUSTER)
  assert_one_sentence(result, "run is already training: run 'bash ")
  (call,) = recorders.calls("gcloud")
  assert "ssh" in call
  assert not (recorders.home / "cm3leon_jax" / "launch").exists()


def test_tpu_vm_brings_the_key_to_a_file_of_root(recorders, tmp_path):
  one_host(recorders)
  script = write(tmp_path) / "tpu_vm.sh"
  assert run_in_root(recorders, script, "run", **CLUSTER, WANDB_API_KEY=KEY).returncode == 0
  (install,) = [call for call in recorders.calls("sudo") if call[0] == "install"]
  assert install[1:3] == ["-D", "--mode=600"]
  assert install[4] == f"/etc/cm3leon-train/{USER}.env"
  assert (recorders.home / "env").read_text() == f"WANDB_API_KEY={KEY}\n"
  unit = (POD / "cm3leon-train@.service").read_text()
  assert "\nEnvironmentFile=-/etc/cm3leon-train/%i.env\n" in unit
  # The key is in no argument and in no file that other users can read.
  assert not [call for call in recorders.calls("gcloud") if KEY in " ".join(call)]
  kept = [p for p in recorders.home.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
  assert kept == [recorders.home / "env"]
  assert not (recorders.home / "cm3leon_jax.tar.gz").exists()


HOSTS = ["tpu-vm", "ssh", "run", "--worker=all"]
LOGS = "--command=sudo journalctl --unit=cm3leon-train@$USER --lines=100 --follow"
STATUS = "--command=hostname; systemctl is-active cm3leon-train@$USER || true"
STOP = "--command=sudo systemctl disable --now cm3leon-train@$USER"
CREATE = ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"]
REQUEST = ["queued-resources", "create", "run", "--node-id=run", *CREATE]


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["create", "--reserved"], [*REQUEST, "--reserved"]),
    (["state"], ["queued-resources", "describe", "run", "--format=value(state.state)"]),
    (["status"], [*HOSTS, STATUS]),
    (["logs"], [*HOSTS[:3], "--worker=0", LOGS]),
    (["logs", "5"], [*HOSTS[:3], "--worker=5", LOGS]),
    (["stop"], [*HOSTS, STOP]),
    (["delete"], ["queued-resources", "delete", "run", "--force"]),
  ],
)
def test_tpu_vm_commands(recorders, tmp_path, arguments, expected):
  recorders.add("gcloud")
  script = write(tmp_path) / "tpu_vm.sh"
  assert run_script(recorders, script, *arguments, **CLUSTER).returncode == 0
  end = ["--project=project", "--zone=us-west4-a"]
  assert recorders.calls("gcloud") == [["compute", "tpus", *expected, *end]]


def test_tpu_vm_asks_for_a_reservation_and_an_account_if_they_are_given(recorders, tmp_path):
  recorders.add("gcloud")
  account = "trainer@my-project.iam.gserviceaccount.com"
  script = write(tmp_path, reservation="july", service_account=account) / "tpu_vm.sh"
  assert run_script(recorders, script, "create", **CLUSTER).returncode == 0
  ((alpha, *call),) = recorders.calls("gcloud")
  assert [alpha, *call[:4]] == ["alpha", "compute", "tpus", "queued-resources", "create"]
  assert sorted(call[4:]) == sorted([
    "run", "--project=project", "--zone=us-west4-a", "--node-id=run", *CREATE,
    "--reservation=july", f"--service-account={account}",
  ])  # fmt: skip
  # A service account without `@` is one of Kubernetes, which a TPU VM does not have.
  plain = write(tmp_path, service_account="trainer") / "tpu_vm.sh"
  assert run_script(recorders, plain, "create", **CLUSTER).returncode == 0
  assert not [x for x in recorders.calls("gcloud")[-1] if "account" in x or "reserv" in x]


def test_tpu_vm_asks_for_spot_slices_and_reaches_each(recorders, tmp_path):
  recorders.add("gcloud")
  script = write(tmp_path, "v5p-256", 2, spot=True) / "tpu_vm.sh"
  assert run_script(recorders, script, "create", **CLUSTER).returncode == 0
  assert {
    "--node-count=2", "--node-prefix=run", "--accelerator-type=v5p-256", "--spot",
  } <= set(recorders.calls("gcloud")[0])  # fmt: skip
  assert run_script(recorders, script, "stop", **CLUSTER).returncode == 0
  assert sorted(call[4] for call in recorders.calls("gcloud")[1:]) == ["run-0", "run-1"]


def watched(recorders, tmp_path, states, services=(), created=()):
  """Runs `watch` with fake states of the queued resource and service, and exit codes of `create`.

  The file `left` lists temporary folders that still exist when `watch` reads a state.
  """
  lines = {"states": states, "services": services, "created": created}
  for name, values in lines.items():
    (tmp_path / name).write_text("".join(f"{value}\n" for value in values))
  recorders.add(
    "gcloud",
    f'next() {{ head -n 1 "{tmp_path}/$1"; sed -i 1d "{tmp_path}/$1"; }}\n'
    f'case "$*" in *" list "*) ls -d "$TMPDIR"/tmp.* >>"{tmp_path}/left" 2>/dev/null\n'
    'state=$(next states); printf "other\\tACTIVE\\n"\n'
    '[ "$state" = GONE ] || printf "run\\t%s\\n" "$state" ;;\n'
    '*failedData*) echo "Quota exceeded." ;;\n'
    '*" create "*) exit "$(next created)" ;;\n'
    '*"--worker=0"*is-active*) next services ;; esac',
  )
  script = write(tmp_path, spot=True) / "tpu_vm.sh"
  result = run_in_root(recorders, script, "watch", "--reserved", **CLUSTER, WATCH_SECONDS="0")
  assert not [line for name in lines for line in (tmp_path / name).read_text().splitlines()]
  return result


def asked(recorders):
  """Returns the calls that create or delete the queued resource, in order."""
  calls = [call[2:4] for call in recorders.calls("gcloud")]
  return [does for what, does in calls if what == "queued-resources" and does in ASKS]


ASKS = ("create", "delete")


@pytest.mark.slow
def test_tpu_vm_watch_asks_again_after_a_preemption_and_ends_with_the_training(recorders, tmp_path):
  """The request waits, gets a slice, trains, is preempted, gets a slice again, trains and ends.

  After each slice that it gets, failures are counted from 0 again.
  """
  states = ["FAILED", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED"]
  states += ["FAILED"] * 4 + ["PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE"]
  services = ["inactive", "active", "inactive", "active", "inactive"]
  result = watched(recorders, tmp_path, states, services, [0] * 6)
  assert result.returncode == 0, result.stderr
  assert "training has ended" in result.stdout
  assert asked(recorders) == ["delete", "create"] * 6
  calls = recorders.calls("gcloud")
  created = [call for call in calls if call[3] == "create"]
  assert all({"--spot", "--reserved"} <= set(call) for call in created)
  assert sum(call[2:4] == ["tpu-vm", "scp"] for call in calls) == 2
  # The copied folder contains the key, so it must be deleted.
  assert (tmp_path / "left").read_text() == ""
  assert not list(recorders.home.glob("tmp.*"))


@pytest.mark.parametrize(
  ("states", "created", "does", "end"),
  [
    (["FAILED"] * 5, [0] * 4, ["delete", "create"] * 4, "run FAILED 5 times: see the reason "),
    # Somebody deletes the request.
    (
      ["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE", "DELETING", "GONE"], [0],
      ["delete", "create"], "the queued resource run is gone: it was deleted, and ",
    ),
    (
      ["SUSPENDED"] + ["GONE"] * 5, [1] * 5,
      ["delete"] + ["create"] * 5, "run could not be asked for 5 times: see the message ",
    ),
  ],
)  # fmt: skip
def test_tpu_vm_watch_stops(recorders, tmp_path, states, created, does, end):
  services = ["active"] * states.count("ACTIVE")
  result = watched(recorders, tmp_path, states, services, created)
  assert result.returncode == MISTAKE
  assert result.stderr.startswith(f"error: {end}")
  assert asked(recorders) == does
  failed = result.stdout.count("run could not be made: Quota exceeded.\n")
  assert failed == states.count("FAILED")
