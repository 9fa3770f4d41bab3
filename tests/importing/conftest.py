"""Writes a published checkpoint once for the tests in this folder."""

import pytest

from tests.importing import published


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
  """Returns the folder of a small Qwen3 with grouped-query attention and tied embeddings."""
  folder = tmp_path_factory.mktemp("qwen3")
  published.save_qwen3(folder)
  return folder
