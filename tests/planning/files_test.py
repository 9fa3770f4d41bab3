"""Which files `launch.plan` writes for a job, what it says about the others, what it refuses."""

import dataclasses
import re

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.planning import hardware, launchers
from tests.recorders import FLAGS

IMAGE = "us-docker.pkg.dev/project/repository/cm3leon:tpu"


@pytest.mark.parametrize(
  ("topology", "options", "sentence"),
  [
    ("v5e-256", {"workdir": "runs/7b"}, "--workdir is 'runs/7b'; it must be gs://BUCKET/FOLDER:"),
    ("v5e-256", {"workdir": "/nfs/7b"}, "--workdir is '/nfs/7b'; it must be gs://BUCKET/FOLDER:"),
    ("h100-8", {"workdir": "7b"}, "--workdir is '7b'; it must be gs://BUCKET/FOLDER or /SHARED/"),
    (
      "v5e-256", {"workdir": ""},
      "--out needs --workdir=gs://BUCKET/FOLDER: all hosts read and write one workdir.",
    ),
    ("h100-8", {"queue": "tpus"}, "--queue is of Kueue, which only the files for TPUs use"),
    ("v5e-256", {"name": "7b_run"}, "--name is '7b_run'; Kubernetes and the cloud take at most"),
    ("v5e-256", {"queue": "a b"}, "--queue is 'a b'; it must be a name of an object"),
  ],
)  # fmt: skip
def test_what_no_launcher_could_start_is_refused(topology, options, sentence):
  flags = ("--config=c", f"--workdir={options.pop('workdir', 'gs://bucket/7b')}")
  job = launchers.Job(**{"name": "run", **options}, hardware=hardware.load(topology), flags=flags)
  with pytest.raises(UserError, match=re.escape(sentence)):
    launchers.files(job)


def test_a_launcher_that_cannot_run_a_job_is_left_out_with_a_sentence():
  job = launchers.Job("run", hardware.load("v5e-256", 2), tuple(FLAGS))
  assert list(launchers.files(job)) == ["tpu_vm.sh"]
  image, several = launchers.remarks(job)
  assert image.startswith("gke_jobset.yaml and xpk.sh need a container image")
  assert several.startswith("skypilot.yaml: SkyPilot does not connect slices")
  assert launchers.remarks(launchers.Job("run", job.hardware, job.flags, IMAGE)) == [several]


def test_a_queue_is_not_written_without_the_job_that_waits_in_it():
  job = launchers.Job("run", hardware.load("v5e-256"), tuple(FLAGS), queue="tpus")
  assert list(launchers.files(job)) == ["skypilot.yaml", "tpu_vm.sh"]
  (image,) = launchers.remarks(job)
  assert image.startswith("gke_jobset.yaml, gke_kueue.yaml and xpk.sh need a container image")


def test_machines_that_share_no_folder_get_a_bucket_only():
  shared = ("--config=c", "--workdir=/scratch/7b")
  job = launchers.Job("run", hardware.load("h100-64"), shared)
  assert list(launchers.files(job)) == []
  image, folder = launchers.remarks(job)
  assert image == "slurm.sbatch needs a container image: give --image."
  assert folder == "skypilot.yaml: its machines share no folder; give a gs:// workdir."
  assert list(launchers.files(dataclasses.replace(job, image=IMAGE))) == ["slurm.sbatch"]
  bucket = dataclasses.replace(job, image=IMAGE, flags=tuple(FLAGS))
  assert list(launchers.files(bucket)) == ["skypilot.yaml", "slurm.sbatch"]


def test_slurm_does_not_ask_for_spot_machines_and_says_so():
  job = launchers.Job("run", hardware.load("h100-64"), tuple(FLAGS), IMAGE, spot=True)
  sentence = "slurm.sbatch: --spot changes nothing in SLURM: choose a partition."
  assert launchers.remarks(job) == [sentence]
  assert launchers.remarks(dataclasses.replace(job, spot=False)) == []
