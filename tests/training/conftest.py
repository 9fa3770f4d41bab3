"""Rows, and a run that nothing interrupts."""

import pytest

from cm3leon_jax.data.pipeline import RowLoader
from tests.data.stores import VOCAB, make_plan, make_sources
from tests.training.runs import run


@pytest.fixture(scope="session")
def loader(tmp_path_factory):
  return RowLoader(make_plan(make_sources(tmp_path_factory.mktemp("stores"))), VOCAB)


@pytest.fixture(scope="session")
def whole(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  summary = run(folder, loader)
  return folder, summary
