import json
import re

import nbclient
import nbformat
import pytest

from tests.api_test import EXAMPLES, ROOT

QUICKSTART, FINETUNE = (ROOT / "docs" / f"{name}.ipynb" for name in ("quickstart", "finetune"))
SHORT = {"minutes=8)": 'minutes=8, fields={"train.steps": 6})'}
HIGH = [f".{name}(" for name in EXAMPLES if name not in ("sample", "requests")]


def code_of(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


NOTEBOOKS = [(QUICKSTART, 200_000, HIGH), (FINETUNE, 300_000, SHORT)]


@pytest.mark.parametrize(("path", "size", "needed"), NOTEBOOKS)
def test_a_notebook_is_small_and_its_outputs_are_shown(path, size, needed):
  code = code_of(nbformat.read(path, as_version=4))
  assert all(cell.outputs for cell in code)
  assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
  sources = "".join(cell.source for cell in code)
  assert not [text for text in needed if text not in sources]
  text = path.read_text()
  assert len(text) < size
  assert not re.search(r"/(work|tmp|root|home|Users|usr)/", text)


@pytest.mark.slow
def test_quickstart_runs(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(QUICKSTART, as_version=4)
  code = code_of(notebook)
  for cell in code:
    cell.outputs = []
  nbclient.NotebookClient(notebook, timeout=300).execute()  # Raises the error of a failing cell.
  assert all(cell.outputs for cell in code)
  assert any("image/png" in output.get("data", {}) for output in code[1].outputs)
  code[1].source = "model.generate(5)"
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="TypeError"):
    nbclient.NotebookClient(notebook, timeout=300).execute()


@pytest.mark.slow
def test_finetune_runs(monkeypatch, tmp_path):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # Users have one device.
  notebook = nbformat.read(FINETUNE, as_version=4)
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
