"""Tests the scripts that `cm3leon plan` writes, with fakes of gcloud and srun."""

import re
import subprocess

import pytest

from cm3leon_jax.errors import INTERRUPTED
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


def test_slurm_knows_every_option_and_sends_sigterm_before_the_time_limit(tmp_path):
  options = sbatch_options(write(tmp_path, "h100-64"))
  # Each of these is an option in sbatch's manual.
  assert options.keys() == {
    "job-name", "nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "mem", "exclusive",
    "time", "output", "open-mode", "requeue", "signal", "export",
  }  # fmt: skip
  assert options["signal"] == "TERM@1200"
  assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == ("8",) * 3


@pytest.mark.parametrize("variable", ["PROJECT", "ZONE"])
def test_a_missing_variable_is_reported_in_one_sentence(recorders, tmp_path, variable):
  environment = {name: value for name, value in CLUSTER.items() if name != variable}
  result = run_script(recorders, write(tmp_path) / "tpu_vm.sh", "run", **environment)
  assert_one_sentence(result, f"{variable} is not set: export it, as in {variable}=")
