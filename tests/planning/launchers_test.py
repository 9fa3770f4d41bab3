"""Tests the scripts that `cm3leon plan` writes, with fakes of gcloud and srun."""

import re
import subprocess

import pytest

from cm3leon_jax.config import INTERRUPTED
from cm3leon_jax.planning import hardware, launchers
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
  assert len(scripts) >= 2
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
    assert len(texts) >= 2
    training = [path for path in paths if path.name != "offline_ray.sh"]
    assert all("WANDB_API_KEY" in path.read_text() for path in training)
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


# Tests of Ray.

RAY = {"RAY_ADDRESS": "http://head:8265", "HOSTS": "3", "HOST_CPUS": "96"}
OFFLINE = ["prepare_data", "train_text_tokenizer", "encode_documents", "build_neighbors"]


def test_ray_gets_the_flags_whole_and_a_worker_for_each_core_or_host(recorders, tmp_path):
  recorders.add("ray", 'while [ "$1" != -- ]; do shift; done; shift; "$@"')
  recorders.add("cm3leon")
  script = write(tmp_path, slices=2) / "offline_ray.sh"
  result = run_script(recorders, script, **RAY)
  assert result.returncode == 0, result.stderr
  assert [call[:3] for call in recorders.calls("ray")] == [["job", "submit", "--working-dir=."]] * 4
  calls = recorders.calls("cm3leon")
  assert [call[0] for call in calls] == OFFLINE
  assert all(call[1 : 1 + len(FLAGS)] == FLAGS for call in calls)
  cores, none, hosts, last = (call[1 + len(FLAGS) :] for call in calls)
  ray = ["--runner=ray", "--ray_address=auto"]
  assert cores == [*ray, "--ray_workers=282", "--ray_worker_cpus=1"]
  assert hosts == last == [*ray, "--ray_workers=3", "--ray_worker_cpus=94"]
  assert none == []


def test_the_stages_of_ray_are_chosen_by_name_and_end_at_the_first_failure(recorders, tmp_path):
  recorders.add("ray", 'case "$*" in *encode_documents*) exit 1 ;; esac')
  script = write(tmp_path) / "offline_ray.sh"
  chosen = ["train_text_tokenizer", "encode_documents", "build_neighbors"]
  assert run_script(recorders, script, *chosen, **RAY).returncode == 1
  assert len(recorders.calls("ray")) == 2
  result = run_script(recorders, script, "train", **RAY)
  assert_one_sentence(result, "unexpected stage 'train'; it must be prepare_data, ")
  for name, value in (("RAY_ADDRESS", ""), ("HOSTS", "many"), ("HOST_CPUS", "0")):
    result = run_script(recorders, script, **{**RAY, name: value})
    assert (result.returncode, result.stdout) == (MISTAKE, "")
    assert result.stderr.startswith(f"error: {name} is ")


def test_ray_gets_no_flag_of_the_training_and_uploads_no_shipped_config(recorders, tmp_path):
  recorders.add("ray")
  flags = ("--config=cm3leon_7b", "--workdir=gs://b/7b", "--init_from=gs://b/old")
  job = launchers.PodJob("run", hardware.load("v5e-256"), flags)
  script = tmp_path / "offline_ray.sh"
  script.write_text(launchers.files(job)["offline_ray.sh"])
  assert run_script(recorders, script, "train_text_tokenizer", **RAY).returncode == 0
  assert recorders.calls("ray") == [
    ["job", "submit", "--", "cm3leon", "train_text_tokenizer", *flags[:2]]
  ]


@pytest.mark.parametrize("variable", ["PROJECT", "ZONE"])
def test_a_missing_variable_is_reported_in_one_sentence(recorders, tmp_path, variable):
  environment = {name: value for name, value in CLUSTER.items() if name != variable}
  result = run_script(recorders, write(tmp_path) / "tpu_vm.sh", "run", **environment)
  assert_one_sentence(result, f"{variable} is not set: export it, as in {variable}=")
