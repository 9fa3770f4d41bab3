import re

import nbclient
import nbformat
import pytest

from tests.api_test import EXAMPLES, ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_the_notebook_is_small_and_its_outputs_are_shown():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert all(cell.outputs for cell in code)
  assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
  sources = "".join(cell.source for cell in code)
  high = [name for name in EXAMPLES if name not in ("sample", "requests")]
  assert not [name for name in high if f".{name}(" not in sources]
  text = NOTEBOOK.read_text()
  assert len(text) < 200_000
  assert not re.search(r"/(work|tmp|root|home|Users|usr)/", text)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  for cell in notebook.cells:
    cell.pop("outputs", None)
    if cell.cell_type == "code":
      cell.outputs = []
  nbclient.NotebookClient(notebook, timeout=300).execute()  # Raises the error of a failing cell.
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert all(cell.outputs for cell in code)
  assert any("image/png" in output.get("data", {}) for output in code[1].outputs)
  code[1].source = "model.generate(5)"
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="TypeError"):
    nbclient.NotebookClient(notebook, timeout=300).execute()
