import os
import pathlib
import signal
import subprocess
import sys
import time

from etils import epath
import pytest

from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.files.json_files import read_json
from tests.evaluation.protocol_config import get_config
from tests.evaluation.protocol_runs import make_data, make_workdir

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
IMAGES = """
title: drawings
task: image
data: {format: coco_2014, split: val, count: 0}
columns:
  - {name: one document, retrieve: 1, sampling: {guidance: 2.0}}
  - {name: best of two, samples: 2}
metrics: [frechet_distance, clip_score, likelihood]
extractor: clip
"""
TEXTS = """
title: answers
task: text
template: "Question: {prompt} Answer: <mask>."
data: {format: visdial, split: val, count: 0}
columns: [{name: greedy, length: 4, sampling: {text_top_k: 1}}]
metrics: [ndcg, exact_match]
"""


def start(workdir, data, protocol, processes):
  command = ["bash", ROOT / "launch" / "pod" / "local.sh", str(processes), str(8 // processes)]
  flags = ["--config=tests/evaluation/protocol_config.py", f"--workdir={workdir}"]
  command += ["--", *flags, f"--data={data}", f"--protocol={protocol}"]
  env = {**os.environ, "PYTHON": sys.executable, "COMMAND": "launch.evaluate"}
  output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **output)


def results_of(workdir) -> dict:
  [path] = (workdir / "evaluations").glob("*/results.json")
  return read_json(path)


@pytest.mark.parametrize("protocol", [IMAGES, TEXTS], ids=["images", "texts"])
def test_two_processes_find_what_one_finds_also_after_a_kill(protocol, tmp_path):
  data = make_data(tmp_path / "data")
  file = tmp_path / "test.yaml"
  file.write_text(protocol)
  found = []
  for processes in (1, 2):
    workdir = epath.Path(tmp_path / str(processes))
    make_workdir(workdir, settings_from_config(get_config()))
    job = start(workdir, data, file, processes)
    if processes == 2:  # Kills the job after it writes the first samples.
      while not list((workdir / "evaluations").glob("samples/*/samples/*/part_00000.jsonl")):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
      os.killpg(job.pid, signal.SIGKILL)  # The processes of the job have its group.
      job.communicate()
      job = start(workdir, data, file, processes)
    output = job.communicate(timeout=400)[0]
    assert job.returncode == 0, output
    assert output.count("results.json and report.html are in") == 1
    found.append(results_of(workdir))
  one, two = found
  for field in ("columns", "controls", "data", "extractor", "scorer", "protocol"):
    assert one[field] == two[field]
