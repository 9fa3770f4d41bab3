"""Tests that mistakes found before any file access print one sentence and exit with code 2."""

import pathlib
import subprocess

import pytest

from cm3leon_jax.files.json_files import write_json
from tests.launched import launch
from tests.refusals import check_refused


def run(folder: pathlib.Path, name: str, *flags: str) -> subprocess.CompletedProcess:
  return launch(name, *flags, cwd=folder, missing=["gcsfs", "wandb"])


@pytest.mark.parametrize(
  ("command", "flags"),
  [
    ("train", ["--config=scenes", "--config.mesh.fsdp=3"]),
    ("train", ["--config=scenes", "--config.train.wandb=cats"]),
    ("train", ["--config=scenes", "--init_from=gs://bucket/run"]),
    ("evaluate", ["--config=scenes", "--data=s3://bucket/coco"]),
    ("prepare_data", ["--config=scenes", "--config.raw.source=s3://bucket/pairs"]),
    ("prepare_data", ["--config=scenes", "--config.raw.source=gs://bucket/pairs"]),
    ("prepare_data", ["--config=scenes", "--config.raw.licenses=('CC0-1.0',)"]),
    ("prepare_data", ["--config=cm3leon_7b"]),
    ("prepare_data", ["--config=scenes", "--config.vqgan.resolution=50"]),
    ("train_vqgan", ["--config=cm3leon_7b", "--distributed"]),
    ("train_clip", ["--config=cm3leon_7b", "--num_processes=2"]),
    ("train_clip", ["--config=scenes", "--config.clip.resolution=50"]),
    ("report", ["--config=scenes"]),
    ("report", ["--config=scenes", "--num_processes=2"]),
  ],
)
def test_a_mistake_is_found_before_anything_is_written(tmp_path, command, flags):
  (tmp_path / "run").mkdir()
  check_refused(run(tmp_path, command, *flags, "--workdir=run"))
  assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("bucket", ["s3://bucket", "gs://bucket"])
def test_a_workdir_in_a_bucket_that_cannot_be_reached_is_refused(tmp_path, bucket):
  check_refused(run(tmp_path, "evaluate", "--config=scenes", f"--workdir={bucket}/run"))
  assert not list(tmp_path.iterdir())


def test_a_bucket_of_the_config_needs_its_extra(tmp_path):
  write_json(tmp_path / "run" / "raw" / "done.json", {"id": "1", "summary": {}})
  flags = ["--config=scenes", "--workdir=run", "--config.retrieval.clip=gs://bucket/clip"]
  check_refused(run(tmp_path, "build_neighbors", *flags))
