"""Provides a transformers CLIP model with random weights."""

import shutil

import pytest

from tests.clip.huggingface_files import END, write_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("clip")
  write_checkpoint(path, "quick_gelu", END)
  return path


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")
