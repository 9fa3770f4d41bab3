"""Tests the runner and the page of a first run on an accelerator, with parts that take no time."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import zipfile

from etils import epath
import pytest

from benchmarks import first_run, first_run_machine
from benchmarks.first_run import Part
from cm3leon_jax.errors import UserError
from tests import bucket_server

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = {"platform": "gpu", "devices": "1 x NVIDIA T4", "jax": "0.10.2"}
PARTS = [
  Part("good", "Does it run?", ("-c", "print(53)"), 60),
  Part("bad", "Does it fail?", ("-c", "print(8); exit(3)"), 60),
  Part("hangs", "Does it end?", ("-c", "import time; print(7, flush=True); time.sleep(60)"), 2),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  out = tmp_path_factory.mktemp("first_run")
  results = {"machine": MACHINE, "parts": {}}
  first_run.go(PARTS, results, out, epath.Path(out), time.monotonic() + 600)
  return out, results


def test_failures_and_hangs_are_on_the_page_and_all_files_in_the_archive(finished):
  page = (finished[0] / "page.md").read_text()
  assert page.startswith("# First run on 1 x NVIDIA T4\n")
  for row in (r"good \| passed", r"bad \| failed, exit code 3", r"hangs \| stopped after"):
    assert re.search(rf"^\| {row}", page, re.MULTILINE)
  assert "## bad\n`python -c 'print(8); exit(3)'`\n\n```\n8\n```\n" in page
  with zipfile.ZipFile(finished[0] / "first_run.zip") as archive:
    names = {"page.md", "results.json", "good.log", "bad.log", "hangs.log"}
    assert set(archive.namelist()) == {f"first_run/{name}" for name in names}
    assert json.loads(archive.read("first_run/results.json"))["machine"] == MACHINE


def test_a_second_start_runs_only_the_parts_without_a_result(finished, tmp_path, capsys):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  there = epath.Path(tmp_path)
  results = first_run.begin(tmp_path, there, {**MACHINE, "date": "2027-01-01"})
  parts = [*PARTS[:2], Part("hangs", "Does it end?", ("-c", "print(9)"), 60)]
  capsys.readouterr()
  first_run.go(parts, results, tmp_path, there, time.monotonic() + 600)
  assert re.findall(r"^(\w+)(?::| \.\.\.) (\w+)", capsys.readouterr().out, re.MULTILINE) == [
    ("good", "passed"), ("bad", "failed"), ("hangs", "passed"),
  ]  # fmt: skip
  stored = json.loads((tmp_path / "results.json").read_text())["parts"]
  assert [part["lines"] for part in stored.values()] == [["53"], ["8"], ["9"]]
  with pytest.raises(UserError, match=r"another machine or version \(different: jax\)"):
    first_run.begin(tmp_path, there, {**MACHINE, "jax": "0.11"})
  (tmp_path / "results.json").unlink()
  with pytest.raises(UserError, match="is not empty"):
    first_run.begin(tmp_path, there, MACHINE)


IN_BUCKET = """
import pathlib, sys, time
from etils import epath
from benchmarks import first_run
from benchmarks.first_run import Part

first_run.buckets.prepare_access()
parts = [Part("good", "?", ("-c", "print(53)"), 60), Part("bad", "?", ("-c", "exit(3)"), 60)]
there = epath.Path("gs://bucket/first")
for count, folder in enumerate(sys.argv[1:], 1):
  out = pathlib.Path(folder)
  out.mkdir()
  results = first_run.begin(out, there, {"platform": "gpu", "devices": "1 x NVIDIA T4"})
  first_run.go(parts[:count], results, out, there, time.monotonic() + 600)
"""


def test_a_run_in_a_bucket_continues_on_another_machine(tmp_path):
  with contextlib.closing(bucket_server.Server()) as server:
    server.put("bucket", "other", b"", None)
    env = {**os.environ, **server.environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_BUCKET, str(tmp_path / "first"), str(tmp_path / "second")]
    printed = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True).stdout
    assert b"good: passed, before\nbad ... failed, exit code 3" in printed
    found = server.files("bucket/first/")
    assert set(found) == {"page.md", "results.json", "good.log", "bad.log", "first_run.zip"}
    assert found["good.log"] == b"53\n"


@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
def test_all_parts_fit_into_30_minutes(platform, tmp_path):
  parts = first_run.parts_of(platform, tmp_path)
  assert sum(part.seconds for part in parts) <= 30 * 60
  assert [part.name for part in parts][:2] == ["tests", "train_step"]
  given = first_run.parts_of(platform, tmp_path, "anole")
  assert [part.name for part in given] == ["weights", *(part.name for part in parts)]
  small = "--length=128" in parts[2].command
  assert small == (platform == "cpu")


def test_the_page_has_the_limits_of_the_parts(tmp_path):
  page = (ROOT / "docs" / "pods.md").read_text()
  limits = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) min \|$", page, re.MULTILINE)
  parts = first_run.parts_of("gpu", tmp_path)
  assert [(name, 60 * float(limit)) for name, limit in limits] == [
    (part.name, part.seconds) for part in parts
  ]


def test_the_machine_is_described():
  found = first_run_machine.describe()
  assert found["devices"] == "8 x cpu"
  assert found["platform"] == "cpu"
  assert {"date", "processor", "system", "python", "jax", "jaxlib", "flax"} <= set(found)
  assert "" not in found.values()


@pytest.mark.parametrize(
  ("drivers", "files", "device"),
  [
    ("", "", "cpu"), ("", "accel", "tpu"), ("", "vfio", "tpu"), ("580.65", "vfio", "cuda13"),
    ("525.60\n525.60", "", "cuda12"),
  ],
)  # fmt: skip
def test_a_gpu_is_found_before_device_files_that_tpus_also_have(drivers, files, device, tmp_path):
  """Runs `device` of the script on a machine with these drivers and device files."""
  script = (ROOT / "launch" / "first_run.sh").read_text().partition("found=")[0]
  shutil.copy(ROOT / "launch" / "venv.sh", tmp_path)
  exists = f"compgen() {{ [[ -n '{files}' && $2 == *'{files}'* ]]; }}\n"
  (tmp_path / "script.sh").write_text(f"{script}{exists}found=$(device)\necho $found\n")
  (tmp_path / "bin").mkdir()
  smi = tmp_path / "bin" / "nvidia-smi"
  smi.write_text(f"#!/bin/sh\n[ -n '{drivers}' ] && echo '{drivers}'\n")
  smi.chmod(0o755)
  found = subprocess.run(
    ["bash", str(tmp_path / "script.sh")], capture_output=True, text=True, check=False,
    env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
  )  # fmt: skip
  assert (found.returncode, found.stdout) == (0, f"{device}\n")


def start_script(folder, **environment):
  """Runs the script where the only Python is too old; returns the result and calls of Python."""
  for name in ("launch", "bin"):
    (folder / name).mkdir()
  for name in ("venv.sh", "first_run.sh"):
    shutil.copy(ROOT / "launch" / name, folder / "launch")
  for name in ("bash", "dirname", "sh"):
    (folder / "bin" / name).symlink_to(shutil.which(name))
  calls, new = folder / "calls", folder / "python3.11"  # The new one cannot make an environment.
  old = f'[ "$1" = -c ] && exit 1; echo "$@" >>{calls}; [ "$4" != find ] || echo {new}'
  # The metadata server.
  curl = '[[ "$*" != *"Metadata-Flavor: Google"*/worker-network-endpoints ]] || echo "$ENDPOINTS"'
  programs = {"bin/python3": old, "python3.11": '[ "$1" = -c ]', "bin/curl": curl}
  for name, code in programs.items():
    (folder / name).write_text(f"#!/bin/bash\n{code}\n")
    (folder / name).chmod(0o755)
  result = subprocess.run(
    ["bash", folder / "launch" / "first_run.sh"], capture_output=True, text=True, check=False,
    env={"PATH": str(folder / "bin"), "ENDPOINTS": "", **environment},
  )  # fmt: skip
  return result, calls.read_text().splitlines() if calls.exists() else []


TPU = {"BASH_FUNC_compgen%%": "() { [[ $2 == *accel* ]]; }"}


def test_uv_installs_a_python_where_all_are_too_old(tmp_path):
  result, calls = start_script(tmp_path, **TPU, TPU_WORKER_HOSTNAMES="localhost")
  uv = ["-m uv python install 3.11", "-m uv python find 3.11"]
  assert calls == ["-m pip install --user --quiet uv", *uv]
  assert "uv installs one" in result.stdout
  assert result.stderr.startswith(f"error: '{tmp_path}/python3.11 -m venv' failed")


@pytest.mark.parametrize("given", [{"TPU_WORKER_HOSTNAMES": "a,b"}, {"ENDPOINTS": "a:1:c,b:1:d"}])
def test_a_host_of_several_is_refused_before_anything_is_installed(given, tmp_path):
  result, calls = start_script(tmp_path, **TPU, **given)
  assert (result.returncode, calls) == (2, [])
  assert "one of several of a TPU slice" in result.stderr
