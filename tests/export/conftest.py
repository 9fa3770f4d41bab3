"""Makes one tiny run for each test file in this folder."""

import dataclasses
import shutil

from etils import epath
import pytest

from cm3leon_jax.commands import export
from cm3leon_jax.data.documents.store import DocumentStore, write_documents
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.run.run import Run
from tests.generation.run import SETTINGS, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns a run whose averaged parameters are `random_params`; its last parameters are NaN."""
  root = epath.Path(tmp_path_factory.mktemp("run"))
  save_run(root)
  return root


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
  """Writes a StableHLO export and returns the path of a copy."""
  output = tmp_path_factory.mktemp("exported") / "output"
  export.main(SETTINGS, run, export.Flags(format="stablehlo", output=str(output)))
  return shutil.copytree(output, tmp_path_factory.mktemp("copied") / "served")


def with_bank(run, folder):
  """Copies a run, which then retrieves only from its last five documents. Returns the copy."""
  shutil.copytree(run, folder)
  store = DocumentStore(folder / "documents" / "train_pairs", SETTINGS.vocab)
  last = [store[i] for i in range(len(store))][-5:]
  write_documents(folder / "documents" / "bank_pairs", last, SETTINGS.vocab)
  write_json(folder / "neighbors" / "train" / "rows.json", {"first_bank": len(store) - 5})
  retrieval = dataclasses.replace(SETTINGS.retrieval, train_documents=False)
  return Run(folder, dataclasses.replace(SETTINGS, retrieval=retrieval))
