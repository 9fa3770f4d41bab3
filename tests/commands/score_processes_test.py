import json
import os
import pathlib
import subprocess
import sys

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.files.json_files import read_json
from tests.evaluation.protocol_config import get_config
from tests.generation.run import save_run

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


def run(workdir, documents, processes, *flags):
  result = subprocess.run(
    ["bash", ROOT / "launch" / "pod" / "local.sh", str(processes), str(8 // processes), "--",
     "--config=tests/evaluation/protocol_config.py", f"--workdir={workdir}",
     f"--documents={documents}", *flags],
    cwd=ROOT,
    env={**os.environ, "PYTHON": sys.executable, "COMMAND": "launch.score"},
    capture_output=True, text=True, check=False, timeout=400,
  )  # fmt: skip
  return result.returncode, result.stdout + result.stderr


def results_of(workdir):
  [folder] = (workdir / "scores").iterdir()
  lines = (folder / "scores.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines], read_json(folder / "summary.json")


def test_two_processes_find_what_one_finds(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  lines = [{"text": "red apple"}, {"image": "a.png", "caption": "green apple"}]
  lines += [{"segments": [{"image": "a.png"}, {"text": "old house"}]}]
  documents = tmp_path / "docs.jsonl"
  documents.write_text("\n".join(map(json.dumps, lines)))
  found = []
  for processes in (1, 2):
    workdir = epath.Path(tmp_path / str(processes))
    save_run(workdir, settings_from_config(get_config()))
    code, output = run(workdir, documents, processes, "--retrieve=2")
    assert code == 0, output
    assert output.count("score: 3 documents; text: perplexity ") == 1
    found.append(results_of(workdir))
  (one, summary_of_one), (two, summary_of_two) = found
  assert [len(line["neighbors"]) for line in one] == [0, 2, 0]
  for a, b in zip(one, two, strict=True):
    assert (a["tokens"], a["neighbors"]) == (b["tokens"], b["neighbors"])
    np.testing.assert_allclose(a["log_probs"][1:], b["log_probs"][1:], rtol=1e-4, atol=1e-4)
  assert summary_of_one["text"] == pytest.approx(summary_of_two["text"], rel=1e-4)
  code, output = run(workdir, documents, 2, "--retrieve=2")
  assert (code, output.count("finished already, skipped")) == (0, 1)
  documents.write_text('{"text": ""}')
  code, output = run(workdir, documents, 2)
  assert code == 2
  assert "docs.jsonl, line 1, key 'docs.jsonl/0': field 'text' is empty" in output
