import dataclasses
import json
import re

import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.planning import hardware, launchers, plan_folder
from tests.recorders import FLAGS
from tests.refusals import refused

IMAGE = "us-docker.pkg.dev/project/repository/cm3leon:tpu"


@pytest.mark.parametrize(
  ("topology", "field", "value"),
  [
    ("v5e-256", "workdir", "/nfs/7b"),
    ("h100-8", "workdir", "7b"),
    ("v5e-256", "workdir", ""),
    ("v5e-256", "name", "7b_run"),
    ("v5e-256", "queue", "a b"),
    ("v5e-256", "priority", "High"),
    ("h100-8", "priority", "a b"),
    ("v5e-256", "reservation", "$(id)"),
    ("v5e-256", "service_account", "a@b c"),
  ],
)
def test_what_no_launcher_could_start_is_refused(topology, field, value):
  options = {"workdir": "gs://bucket/7b", "name": "run", field: value}
  flags = ("--config=c", f"--workdir={options.pop('workdir')}")
  job = launchers.PodJob(**options, hardware=hardware.load(topology), flags=flags)
  with refused(UserError, f"--{field} is '{value}'"):
    launchers.files(job)


def test_a_launcher_that_cannot_run_a_job_is_left_out_with_a_sentence():
  job = launchers.PodJob("run", hardware.load("v5e-256", 2), tuple(FLAGS))
  assert list(launchers.files(job)) == ["tpu_vm.sh"]
  assert launchers.remarks(job) == ["gke_jobset.yaml needs a container image: give --image."]
  assert launchers.remarks(launchers.PodJob("run", job.hardware, job.flags, IMAGE)) == []


def test_gke_does_not_connect_slices_of_one_host():
  small = hardware.load("v5e-8", 2)
  job = launchers.PodJob("run", small, tuple(FLAGS), IMAGE)
  assert list(launchers.files(job)) == ["tpu_vm.sh"]
  assert launchers.remarks(job) == ["gke_jobset.yaml: GKE connects only slices of several hosts."]
  one = dataclasses.replace(job, hardware=hardware.load("v5e-8"))
  assert "gke_jobset.yaml" in launchers.files(one)


@pytest.mark.parametrize("workdir", ["/scratch/7b", "gs://bucket/7b"])
def test_gpus_may_train_in_a_shared_folder_or_a_bucket(workdir):
  flags = ("--config=c", f"--workdir={workdir}")
  job = launchers.PodJob("run", hardware.load("h100-64"), flags)
  assert launchers.files(job) == {}
  names = ["gpu_jobset.yaml", "slurm.sbatch"]
  assert sorted(launchers.remarks(job)) == [
    f"{x} needs a container image: give --image." for x in names
  ]
  job = dataclasses.replace(job, image=IMAGE)
  assert list(launchers.files(job)) == names


@pytest.mark.parametrize("topology", ["v5e-256", "h100-64"])
def test_every_launcher_says_how_the_key_reaches_the_processes(topology):
  job = launchers.PodJob("run", hardware.load(topology), tuple(FLAGS), IMAGE)
  sentences = dict(sentence.split(": ", 1) for sentence in launchers.keys(job))
  assert sorted(sentences) == sorted(launchers.files(job))
  assert all(text.startswith("WANDB_API_KEY comes from ") for text in sentences.values())
  if topology == "v5e-256":
    own = launchers.keys(dataclasses.replace(job, secret="own"))
    assert "generic cm3leon " in sentences["gke_jobset.yaml"]
    assert sum("generic own " in sentence for sentence in own) == 1


@pytest.mark.parametrize(
  ("topology", "ignored"),
  [
    ("v5e-256", [("tpu_vm.sh", x) for x in ("queue", "service_account", "priority", "cpus")]),
    (
      "h100-64",
      [("gpu_jobset.yaml", "spot")]
      + [("slurm.sbatch", x) for x in ("queue", "service_account", "spot")],
    ),
  ],
)
def test_a_flag_that_a_file_does_not_follow_is_named(topology, ignored):
  job = launchers.PodJob(
    "run", hardware.load(topology), tuple(FLAGS), IMAGE, service_account="trainer", queue="q",
    priority="own", cpus=40, spot=True,
  )  # fmt: skip
  expected = [f"{file}: --{flag} changes nothing here." for file, flag in ignored]
  assert launchers.remarks(job) == expected


@pytest.mark.parametrize("topology", ["v5e-256", "h100-64"])
def test_every_file_says_what_it_needs(topology):
  """Only files that copy a checkout to the hosts may mention its paths."""
  port = {"metrics_port": 9464, "queue": "q" if topology == "v5e-256" else ""}
  job = launchers.PodJob("run", hardware.load(topology), tuple(FLAGS), IMAGE, **port)
  texts = launchers.files(job)
  assert len(texts) == 2
  for name, text in texts.items():
    head = [line for line in text.splitlines()[:8] if line.startswith("# Needs: ")]
    assert len(head) == 1, name
    of_checkout = re.search(r"launch[./](?!plan)\w|\.venv", text) is not None
    assert of_checkout == ("a checkout of the repository" in head[0]), name


NUMBERS = {"tokens": 1}


def contents(folder):
  return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_second_plan_replaces_the_files_of_the_first_and_no_others(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  assert plan_folder.write(tmp_path, {"a.sh": "1", "b.yaml": "1"}, NUMBERS) == []
  assert plan_folder.write(tmp_path, {"a.sh": "1", "b.yaml": "1"}, NUMBERS) == []
  assert plan_folder.write(tmp_path, {"a.sh": "2", "c.yaml": "2"}, NUMBERS) == ["b.yaml"]
  found = contents(tmp_path)
  numbers = json.loads(found.pop("plan.json"))
  assert found == {"a.sh": "2", "c.yaml": "2", "notes.txt": "mine"}
  assert numbers["tokens"] == 1
  assert sorted(numbers["files"]) == ["a.sh", "c.yaml"]


@pytest.mark.parametrize("name", ["a.sh", "b.yaml", "c.yaml"])
def test_a_file_that_was_changed_or_is_another_is_kept(tmp_path, name):
  """The second plan would replace a.sh, delete b.yaml and create c.yaml; all files stay."""
  plan_folder.write(tmp_path, {"a.sh": "1", "b.yaml": "1"}, NUMBERS)
  (tmp_path / name).write_bytes(b"mine, not UTF-8: \xff")
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with refused(UserError, name):
    plan_folder.write(tmp_path, {"a.sh": "2", "c.yaml": "2"}, NUMBERS)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_plan_removes_no_file_outside_of_its_folder(tmp_path):
  folder, other = tmp_path / "plan", tmp_path / "other"
  other.write_text("1")
  plan_folder.write(folder, {"a.sh": "1"}, NUMBERS)
  numbers = json.loads((folder / "plan.json").read_text())
  numbers["files"] = {"../other": numbers["files"]["a.sh"]}
  (folder / "plan.json").write_text(json.dumps(numbers))
  assert plan_folder.write(folder, {"a.sh": "1"}, NUMBERS) == []
  assert other.read_text() == "1"
