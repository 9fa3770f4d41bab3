"""Makes one tiny run for each test file in this folder."""

import shutil

from etils import epath
import pytest

from cm3leon_jax.commands import export
from cm3leon_jax.export import formats
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
  export.main(SETTINGS, run, choice=formats.Choice(format="stablehlo"), output=str(output))
  return shutil.copytree(output, tmp_path_factory.mktemp("copied") / "served")
