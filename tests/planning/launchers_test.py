"""Tests the scripts that `cm3leon plan` writes, with fakes of gcloud, xpk and srun."""

import re
import subprocess

import pytest

from cm3leon_jax.config import INTERRUPTED
from tests.recorders import (
  CLUSTER,
  FLAGS,
  KEY,
  MISTAKE,
  PROGRAMS,
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


# Tests of all scripts that a plan writes.


@pytest.mark.parametrize(
  ("topology", "slices", "options"),
  [
    ("v5e-256", 1, {}),
    ("v5p-256", 2, {"spot": True}),
    ("h100-64", 1, {}),
    ("v6e-8", 1, {}),
    ("v5e-256", 2, {"service_account": "a@p.com", "reservation": "r", "priority": "high"}),
    ("h100-64", 1, {"reservation": "r", "priority": "high", "cpus": 96, "memory_gib": 900}),
  ],
)
def test_written_scripts_are_clean(tmp_path, topology, slices, options):
  folder = write(tmp_path, topology, slices, **options)
  scripts = {path.name: path.read_text() for path in folder.glob("*.s*") if path.suffix != ".yaml"}
  assert scripts
  for name, text in scripts.items():
    (folder / name).write_text(text)
    # SC2016 warns about a `$` in single quotes, which these flags contain on purpose.
    found = subprocess.run(
      [PROGRAMS / "shellcheck", "--exclude=SC2016", folder / name],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


def test_no_file_holds_a_secret_of_the_environment(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_API_KEY", KEY)
  for topology, queue in (("v5e-256", "q"), ("h100-64", "")):
    paths = [*write(tmp_path, topology, queue=queue).iterdir()]
    texts = [path.read_text() for path in paths]
    assert texts
    assert all("WANDB_API_KEY" in text for text in texts)
    assert not [text for text in texts if KEY in text]
    assert not [text for text in texts if re.search(r"WANDB_API_KEY[=:] *[\w'\"]{3}", text)]


# Tests of XPK.


def test_xpk_gets_the_flags_whole(recorders, tmp_path):
  recorders.add("xpk")
  recorders.add("cm3leon")
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
  assert recorders.calls("cm3leon") == [["train", "--distributed", *FLAGS]]


def test_xpk_gets_a_reservation_and_a_priority_if_they_are_given(recorders, tmp_path):
  recorders.add("xpk")
  calls = []
  for options in ({}, {"reservation": "july", "priority": "high"}, {"priority": "own"}):
    run_script(recorders, write(tmp_path, **options) / "xpk.sh", **XPK)
    calls.append({x for x in recorders.calls("xpk")[-1] if not x.startswith("--command")})
  plain, given, other = calls
  assert given - plain == {"--reservation=july", "--priority=high"}
  assert plain < given
  assert other == plain


@pytest.mark.parametrize("readable", [True, False])
def test_xpk_reads_the_key_in_the_container(recorders, tmp_path, readable):
  secret, found = "projects/p/secrets/wandb", tmp_path / "found"
  answer = f"{{ printf %s {KEY}; exit; }}" if readable else "exit 1"
  recorders.add("xpk")
  recorders.add(
    "python",
    f'[ "$2" != cm3leon_jax.planning.secret ] || {answer}',
  )
  recorders.add("cm3leon", f'echo "${{WANDB_API_KEY-absent}}" >{found}')
  script = write(tmp_path) / "xpk.sh"
  result = run_script(recorders, script, **XPK, WANDB_SECRET=secret, WANDB_API_KEY=KEY)
  assert result.returncode == 0
  (call,) = recorders.calls("xpk")
  assert KEY not in " ".join(call)
  command = next(argument for argument in call if argument.startswith("--command="))
  recorders.run("bash", "-c", command.removeprefix("--command="))
  assert recorders.calls("python") == [["-m", "cm3leon_jax.planning.secret", secret]]
  # Training starts whether or not the key is readable.
  trained = ["train", "--distributed", *FLAGS]
  assert recorders.calls("cm3leon") == [trained]
  assert found.read_text().strip() == (KEY if readable else "absent")


# Tests of SLURM.


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
  at = call.index("cm3leon")
  assert call[at:] == ["cm3leon", "train", "--distributed", *FLAGS, "--debug_nans"]
  assert {
    "--container-image=registry#image:tag", f"--container-mounts={mounts}",
    "--container-workdir=/app",
  } <= set(call[:at])  # fmt: skip
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
  """SLURM_RESTART_COUNT includes time limits and preemptions, so crashes are counted in a file."""
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


def sbatch_options(folder) -> dict[str, str]:
  text = (folder / "slurm.sbatch").read_text()
  return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))


def test_slurm_asks_for_what_is_given_and_for_nothing_else(tmp_path):
  plain = sbatch_options(write(tmp_path, "h100-64"))
  given = {"reservation": "july", "priority": "normal_QOS", "cpus": 96, "memory_gib": 900}
  found = sbatch_options(write(tmp_path, "h100-64", **given))
  new = {"reservation": "july", "qos": "normal_QOS", "cpus-per-task": "12", "mem": "900G"}
  assert found == {**plain, **new}
  assert (plain["cpus-per-task"], plain["mem"]) == ("8", "0")


def test_slurm_knows_every_option_and_sends_sigterm_before_the_time_limit(tmp_path):
  options = sbatch_options(write(tmp_path, "h100-64"))
  # Each of these is an option in sbatch's manual.
  assert options.keys() == {
    "job-name", "nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "mem", "exclusive",
    "time", "output", "open-mode", "requeue", "signal", "export",
  }  # fmt: skip
  assert options["signal"] == "TERM@1200"
  assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == ("8",) * 3


# Tests of mistakes.


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
