"""Runs docs/finetune.ipynb with a short training, and checks what it stores."""

import json
import re

import nbclient
import nbformat
import pytest

from tests.api_test import ROOT

NOTEBOOK = ROOT / "docs" / "finetune.ipynb"
SHORT = {"minutes=8)": 'minutes=8, fields={"train.steps": 6})'}


def code_of(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_small_and_its_outputs_are_shown():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  assert all(cell.outputs for cell in code_of(notebook))
  outputs = [out for cell in code_of(notebook) for out in cell.outputs]
  assert not [out for out in outputs if out.output_type == "error"]
  text = NOTEBOOK.read_text()
  assert len(text) < 300_000
  assert not re.search(r"/(work|tmp|root|home|Users|usr)/", text)
  assert all(old in "".join(cell.source for cell in code_of(notebook)) for old in SHORT)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, tmp_path):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # Users have one device.
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  for cell in code_of(notebook):
    cell.outputs = []
    for old, new in SHORT.items():
      cell.source = cell.source.replace(old, new)
  resources = {"metadata": {"path": str(tmp_path)}}
  nbclient.NotebookClient(notebook, timeout=1_200, resources=resources).execute()
  printed = "".join(out.get("text", "") for cell in code_of(notebook) for out in cell.outputs)
  assert "reconstructions: the image tokenizer pictures reconstructs held-out images" in printed
  assert re.search(r"forgetting: \d+ held-out documents of scenes: bits per image code", printed)
  assert "[11/11] report" in printed
  stored = json.loads((tmp_path / "my_drawings" / "forgetting" / "done.json").read_text())
  assert stored["summary"]["image"]["documents"] == 200
  assert (tmp_path / "my_drawings" / "report.html").exists()
