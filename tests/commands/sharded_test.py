"""Two jobs never work on the same stage of a workdir."""

import os
import pathlib
import subprocess
import sys

import pytest

from cm3leon_jax.io import write_json

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import sys, time
from cm3leon_jax.training import lease
lease.BEAT_SECONDS = 0.1
with lease.Lease(sys.argv[1]):
  print("held", flush=True)
  time.sleep(120)
"""


@pytest.mark.parametrize(
  ("name", "folder"), [("prepare_data", "raw"), ("encode_documents", "documents")]
)
def test_a_second_job_of_a_stage_is_refused_and_leaves_its_folder_as_it_is(tmp_path, name, folder):
  for stage in {"raw", "text_tokenizer", "vqgan"} - {folder}:
    write_json(tmp_path / stage / "done.json", {"id": stage})
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  hold = [sys.executable, "-c", HOLD, tmp_path / folder]
  with subprocess.Popen(hold, env=environment, stdout=subprocess.PIPE) as other:
    try:
      assert other.stdout.readline() == b"held\n"
      result = subprocess.run(
        [sys.executable, "-m", f"launch.{name}", "--config=scenes", f"--workdir={tmp_path}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False,
      )  # fmt: skip
    finally:
      other.kill()
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith(f"error: process {other.pid} on ")
  assert result.stderr.endswith(
    f" works in {tmp_path / folder}: use another --workdir, or stop that job.\n"
  )
  left = {path.name.removesuffix(".partial") for path in (tmp_path / folder).iterdir()}
  assert left == {"lease.json"}
