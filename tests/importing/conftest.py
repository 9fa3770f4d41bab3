"""Writes a published checkpoint once for the tests in this folder."""

import pytest

from tests.importing import published, published_chameleon


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
  """Returns the folder of a small Qwen3 with grouped-query attention and tied embeddings."""
  folder = tmp_path_factory.mktemp("qwen3")
  published.save_qwen3(folder)
  return folder


@pytest.fixture(scope="session")
def chameleon(tmp_path_factory):
  """Returns a tiny random Chameleon in bfloat16, as transformers loads it, and its folder."""
  folder = tmp_path_factory.mktemp("chameleon")
  return published_chameleon.save(folder), folder
