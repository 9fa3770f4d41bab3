"""Tests runs in a GCS bucket over HTTP with slow responses, errors, and an outage.

The client libraries are real; `tests/bucket_server.py` replaces the server.
"""

import contextlib
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import pytest

from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import TryAgain
from cm3leon_jax.files.json_files import read_json_lines
from tests import bucket_server
from tests.data.checks.leaks_test import photos, write_source
from tests.distributed_test import free_port
from tests.launch.stages_before import make_workdir
from tests.launch.tiny_config import get_config

pytest.importorskip("gcsfs")  # In the extra [data].

ROOT = pathlib.Path(__file__).parents[2]
BASE = ROOT / "ml_configs" / "base.py"
FLAGS = ["--config.train.eval_every=6", "--config.train.sample_every=100"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stages")
  make_workdir(folder, settings_from_config(get_config()))
  return folder


@pytest.fixture
def server(stages):
  with contextlib.closing(bucket_server.Server()) as server:
    for folder, _, names in os.walk(stages, followlinks=True):
      for name in names:
        path = pathlib.Path(folder, name)
        server.put("bucket", f"run/{path.relative_to(stages)}", path.read_bytes(), None)
    yield server


def environment_of(server):
  own = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  own["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return {**os.environ, **own, **server.environment()}


def start(server, cwd, *flags, processes=1, workdir="gs://bucket/run"):
  """Starts the processes of a run in the folder `cwd`; process I writes its output to I.log."""
  jobs, port = [], free_port()
  for i in range(processes):
    command = [
      sys.executable, "-m", "cm3leon_jax.commands.train", f"--workdir={workdir}",
      f"--config={ROOT / 'tests/launch/tiny_config.py'}", *FLAGS, *flags,
    ]  # fmt: skip
    if processes > 1:
      command += [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}"]
      command += [f"--process_id={i}", f"--config.mesh.fsdp={processes}"]
    env = environment_of(server)
    with (cwd / f"{i}.log").open("w") as log:
      jobs.append(subprocess.Popen(command, cwd=cwd, env=env, stdout=log, stderr=log))
  return jobs


def finish(jobs, cwd, code=0):
  for i, job in enumerate(jobs):
    try:
      job.wait(600)
    finally:
      job.kill()
    assert job.returncode == code, (cwd / f"{i}.log").read_text()[-4_000:]


def losses(path):
  return {line["step"]: line["loss"] for line in read_json_lines(path) if "loss" in line}


def bucket_losses(server, cwd):
  path = cwd / "metrics.jsonl"
  path.write_bytes(server.files("bucket/run/train/")["metrics/metrics.jsonl"])
  return losses(path)


@pytest.fixture(scope="module")
def local_losses(stages, tmp_path_factory):
  cwd = tmp_path_factory.mktemp("local")
  with contextlib.closing(bucket_server.Server()) as server:
    shutil.copytree(stages, cwd / "run")
    finish(start(server, cwd, workdir=cwd / "run"), cwd)
    assert not server.requests
  return losses(cwd / "run" / "train" / "metrics" / "metrics.jsonl")


def sealed(server):
  return [n for n in server.files("bucket/run/train/checkpoints.digests/") if n.endswith(".json")]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_in_a_bucket_continues_and_equals_one_on_a_disk(
  server, local_losses, tmp_path, processes
):
  """After checkpoint 8 is sealed, the server stops answering and all processes are killed."""
  reached, answer = threading.Event(), threading.Event()

  def fault(method, path):
    if "8.json" in sealed(server) and not answer.is_set():
      reached.set()
      answer.wait(300)

  server.fault = fault
  jobs = start(server, tmp_path, processes=processes)
  assert reached.wait(240), (tmp_path / "0.log").read_text()
  for job in jobs:
    job.kill()
    job.wait()
  answer.set()
  assert "done.json" not in server.files("bucket/run/train/")
  finish(start(server, tmp_path, processes=processes), tmp_path)
  assert sealed(server) == ["12.json", "8.json"]
  found = bucket_losses(server, tmp_path)
  assert found.keys() == local_losses.keys()
  assert max(abs(found[step] - local_losses[step]) for step in found) < 1e-5
  if processes == 1:
    assert found == local_losses
  files = server.files("bucket/run/train/")
  assert {"config.json", "done.json"} <= files.keys()
  assert "lease.json" not in files
  assert any(name.startswith("tensorboard/events") for name in files)
  assert not [name for name in files if ".partial" in name]
  # Checks that no folder named "gs:" was created.
  assert {path.name.partition(".")[2] for path in tmp_path.iterdir()} == {"log", "jsonl"}


@pytest.mark.slow
def test_a_bucket_that_is_gone_ends_the_run_and_leaves_the_last_checkpoint(
  server, local_losses, tmp_path
):
  """After checkpoint 4 is sealed, the bucket rejects every write."""
  before = {}

  def fault(method, path):
    if not before and "4.json" not in sealed(server):
      return None
    before.update(before or server.files("bucket/run/train/checkpoints/4/"))
    return 503 if method != "GET" else None

  server.fault = fault
  [job] = start(server, tmp_path)
  begin = time.monotonic()
  try:
    job.wait(600)  # Long, because writes of metrics and TensorBoard events are retried, too.
  finally:
    job.kill()
  output = (tmp_path / "0.log").read_text()
  print("seconds until it ended:", round(time.monotonic() - begin))
  print(output)
  # Launchers restart a job with this exit code.
  assert job.returncode == TryAgain.exit_code, output
  [sentence] = [line for line in output.splitlines() if line.startswith("error: ")]
  assert "gs://bucket/run/train" in sentence
  assert "503" in sentence
  assert sentence.endswith("the same command continues from checkpoint 4.")
  assert server.files("bucket/run/train/checkpoints/4/") == before
  server.fault = lambda method, path: None
  finish(start(server, tmp_path), tmp_path)
  assert bucket_losses(server, tmp_path) == local_losses


@pytest.mark.slow
def test_raw_data_from_and_in_a_bucket_are_those_of_a_disk(server, tmp_path):
  """One of five requests gets an error."""
  images = photos("train", range(4)) | photos("heldout", [8, 9])
  folder = write_source(tmp_path / "in", images)
  for path in pathlib.Path(folder).rglob("*"):
    if path.is_file():
      server.put("bucket", f"in/{path.relative_to(folder)}", path.read_bytes(), None)
  numbers = itertools.count()
  server.fault = lambda method, path: 503 if next(numbers) % 5 == 4 else None
  for source, workdir in ((folder, tmp_path / "out"), ("gs://bucket/in", "gs://bucket/out")):
    command = [
      sys.executable, "-m", "cm3leon_jax.commands.prepare_data", f"--config={BASE}",
      f"--config.raw.source={source}", "--config.raw.resolution=64", f"--workdir={workdir}",
      "--config.data.text_share=0.0", "--config.train.global_batch_size=1",
      "--config.data.sequence_length=512",
    ]  # fmt: skip
    environment = environment_of(server)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
  kinds = (".jsonl", ".png", ".jpg", ".jpeg", ".webp")
  expected = {
    str(path.relative_to(tmp_path / "out")): path.read_bytes()
    for path in (tmp_path / "out").rglob("*")
    if path.suffix in kinds
  }
  found = server.files("bucket/out/")
  assert len(expected) > 4
  assert {name: found[name] for name in expected}.keys() == expected.keys()
  for name, content in expected.items():
    assert found[name].replace(b"gs://bucket/in", str(folder).encode()) == content, name
  assert "raw/done.json" in found
