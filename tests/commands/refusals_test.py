"""Mistakes that a command finds before it reads or writes anything: one sentence, exit code 2."""

import pathlib

import pytest

from cm3leon_jax.extras import install
from cm3leon_jax.files.json_files import write_json
from tests.launched import launch


def refusal(folder: pathlib.Path, name: str, *flags: str) -> str:
  """Runs a command in a folder, checks that it is refused, and returns its sentence."""
  result = launch(name, *flags, cwd=folder, missing=["gcsfs", "wandb"])
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith("error: ")
  assert result.stderr.count("\n") == 1
  return result.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize(
  ("command", "flags", "sentence"),
  [
    (
      "train",
      ["--config=scenes", "--config.mesh.fsdp=3"],
      "config.mesh: mesh (data, fsdp, fsdp_inner, tensor) = (1, 3, 1, 1); the product must be 8, "
      "the number of devices, but is 3; an axis of -1 takes the remaining devices.",
    ),
    (
      "train",
      ["--config=scenes", "--config.train.wandb=cats"],
      "config.train.wandb is 'cats', and the package wandb is missing: "
      f"{install('monitoring')}, or leave out config.train.wandb.",
    ),
    (
      "train",
      ["--config=scenes", "--init_from=gs://bucket/run"],
      f"--init_from=gs://bucket/run is in a GCS bucket, which needs gcsfs: {install('data')}.",
    ),
    (
      "evaluate",
      ["--config=scenes", "--data=s3://bucket/coco"],
      "--data=s3://bucket/coco is on S3, which is not supported: give gs://BUCKET/FOLDER, or the "
      "local folder where the bucket is mounted.",
    ),
    (
      "prepare_data",
      ["--config=scenes", "--config.raw.source=s3://bucket/pairs"],
      "config.raw.source=s3://bucket/pairs is on S3, which is not supported: give "
      "gs://BUCKET/FOLDER, or the local folder where the bucket is mounted.",
    ),
    (
      "prepare_data",
      ["--config=cm3leon_7b"],
      "config.raw.source is not set: give --config.raw.source=FOLDER, a folder of images with "
      "caption files (x.jpg, x.txt), tars, Parquet or JSONL, local or gs://; or "
      "'scenes'.",
    ),
    (
      "prepare_data",
      ["--config=scenes", "--config.vqgan.resolution=50"],
      "config.vqgan: resolution is 50; it must be a multiple of downsample = 6.",
    ),
    (
      "train_vqgan",
      ["--config=cm3leon_7b", "--distributed"],
      "--distributed is given, but this command runs in one process; only cm3leon train, cm3leon "
      "evaluate --protocol and cm3leon score run in several; train_vqgan trains on one host: "
      "on a pod use a published image tokenizer, by `cm3leon import_vqgan "
      "--source=FOLDER` (docs/published_tokenizers.md).",
    ),
    (
      "train_clip",
      ["--config=cm3leon_7b", "--num_processes=2"],
      "--num_processes is given, but this command runs in one process; only cm3leon train, cm3leon "
      "evaluate --protocol and cm3leon score run in several; train_clip trains on one host: "
      "on a pod use a published CLIP, by --config.retrieval.clip=FOLDER (docs/scaling.md).",
    ),
    (
      "train_clip",
      ["--config=scenes", "--config.clip.resolution=50"],
      "config.clip: patch = 4 does not divide resolution = 50.",
    ),
  ],
)
def test_a_mistake_is_found_before_anything_is_written(tmp_path, command, flags, sentence):
  (tmp_path / "run").mkdir()
  assert refusal(tmp_path, command, *flags, "--workdir=run") == sentence
  assert not list((tmp_path / "run").iterdir())


def test_a_workdir_on_s3_is_refused(tmp_path):
  sentence = refusal(tmp_path, "train", "--config=scenes", "--workdir=s3://bucket/run")
  assert sentence.startswith("--workdir=s3://bucket/run is on S3, which is not supported: give gs:")
  assert not (tmp_path / "s3:").exists()


def test_a_bucket_of_the_config_needs_its_extra(tmp_path):
  write_json(tmp_path / "run" / "raw" / "done.json", {"id": "1", "summary": {}})
  flags = ["--config=scenes", "--workdir=run", "--config.retrieval.clip=gs://bucket/clip"]
  assert refusal(tmp_path, "build_neighbors", *flags) == (
    f"a path of the config is in a GCS bucket, which needs gcsfs: {install('data')}."
  )
