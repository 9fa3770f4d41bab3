"""Writes a published layout once for the tests of this folder."""

import pytest

from tests.importing import published


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
  """Returns the folder of a small Qwen3ForCausalLM with grouped heads and tied embeddings."""
  folder = tmp_path_factory.mktemp("qwen3")
  published.save_qwen3(folder)
  return folder
