"""Tests the runner and the page of a first run on an accelerator, with parts that take no time."""

import json
import os
import pathlib
import re
import subprocess
import time
import zipfile

import pytest

from benchmarks import first_run, first_run_machine
from benchmarks.first_run import Part

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = {"platform": "gpu", "devices": "1 x NVIDIA T4", "jax": "0.10.2"}
PARTS = [
  Part("good", "Does it run?", ("-c", "print(53)"), 60),
  Part("bad", "Does it fail?", ("-c", "print(8); exit(3)"), 60),
  Part("hangs", "Does it end?", ("-c", "import time; print(7, flush=True); time.sleep(60)"), 2),
]
PAGE = """\
# First run on 1 x NVIDIA T4

- platform: gpu
- devices: 1 x NVIDIA T4
- jax: 0.10.2

| part | outcome | seconds | question |
|---|---|---|---|
| good | passed | 0 | Does it run? |
| bad | failed, exit code 3 | 0 | Does it fail? |
| hangs | stopped after its limit of 2 s | 2 | Does it end? |

## good
`python -c 'print(53)'`

```
53
```

## bad
`python -c 'print(8); exit(3)'`

```
8
```

## hangs
`python -c 'import time; print(7, flush=True); time.sleep(60)'`

```
7
```
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  out = tmp_path_factory.mktemp("first_run")
  results = {"machine": MACHINE, "parts": {}}
  first_run.go(PARTS, results, out, time.monotonic() + 600)
  return out, results


def test_failures_and_hangs_are_on_the_page_as_they_are(finished):
  out, results = finished
  for part in results["parts"].values():
    part["seconds"] = int(part["seconds"])
  assert first_run.first_run_page.page(results) == PAGE
  assert (out / "page.md").read_text().startswith("# First run on 1 x NVIDIA T4\n")


def test_one_file_has_everything(finished):
  out, _ = finished
  with zipfile.ZipFile(out / "first_run.zip") as archive:
    names = {"page.md", "results.json", "good.log", "bad.log", "hangs.log"}
    assert set(archive.namelist()) == {f"first_run/{name}" for name in names}
    assert json.loads(archive.read("first_run/results.json"))["machine"] == MACHINE
    assert archive.read("first_run/good.log") == b"53\n"


def test_parts_without_time_do_not_start(tmp_path):
  results = {"machine": MACHINE, "parts": {}}
  first_run.go(PARTS, results, tmp_path, time.monotonic() + 5)
  outcomes = {part["outcome"] for part in results["parts"].values()}
  assert outcomes == {"not started: no time was left"}
  assert not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
def test_all_parts_fit_into_30_minutes(platform, tmp_path):
  parts = first_run.parts_of(platform, tmp_path)
  assert sum(part.seconds for part in parts) <= 30 * 60
  assert [part.name for part in parts][:2] == ["tests", "train_step"]
  small = "--length=128" in parts[2].command
  assert small == (platform == "cpu")


def test_the_page_has_the_limits_of_the_parts(tmp_path):
  page = (ROOT / "docs" / "first_run.md").read_text()
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
  found = device_of(tmp_path, drivers, files)
  assert (found.returncode, found.stdout) == (0, f"{device}\n")


def test_a_driver_that_is_too_old_is_refused(tmp_path):
  found = device_of(tmp_path, "470.82", "")
  assert (found.returncode, found.stdout) == (2, "")
  assert "the NVIDIA driver is 470; JAX needs 525 or newer" in found.stderr


def device_of(folder, drivers, files):
  """Runs `device` of the script on a machine with these drivers and device files."""
  script = (ROOT / "launch" / "first_run.sh").read_text().partition("found=")[0]
  (folder / "venv.sh").write_bytes((ROOT / "launch" / "venv.sh").read_bytes())
  exists = f"compgen() {{ [[ -n '{files}' && $2 == *'{files}'* ]]; }}\n"
  (folder / "script.sh").write_text(f"{script}{exists}found=$(device)\necho $found\n")
  (folder / "bin").mkdir()
  smi = folder / "bin" / "nvidia-smi"
  smi.write_text(f"#!/bin/sh\n[ -n '{drivers}' ] && echo '{drivers}'\n")
  smi.chmod(0o755)
  return subprocess.run(
    ["bash", str(folder / "script.sh")], capture_output=True, text=True, check=False,
    env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
  )  # fmt: skip
