"""Makes one tiny run for the tests of a file of this folder."""

from etils import epath
import pytest

from tests.generation.run import save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run whose average is `random_params`, and whose parameters are NaN."""
  root = epath.Path(tmp_path_factory.mktemp("run"))
  save_run(root)
  return root
