"""Published layouts, written once for the tests of this folder."""

import pytest

from tests.importing import published


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
  """A small Qwen3ForCausalLM with grouped heads and one table."""
  folder = tmp_path_factory.mktemp("qwen3")
  published.save_qwen3(folder)
  return folder
