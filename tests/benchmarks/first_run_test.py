"""Tests the runner and the page of a first run on an accelerator, with parts that take no time."""

import json
import time
import zipfile

import pytest

from benchmarks import first_run, first_run_machine
from benchmarks.first_run import Part

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


def test_the_machine_is_described():
  found = first_run_machine.describe()
  assert found["devices"] == "8 x cpu"
  assert found["platform"] == "cpu"
  assert {"date", "processor", "system", "python", "jax", "jaxlib", "flax"} <= set(found)
  assert "" not in found.values()
