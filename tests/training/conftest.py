"""Defines fixtures: rows, a run without interruptions, checkpoints that tests damage."""

import pytest

from cm3leon_jax.data.rows.loader import RowLoader
from tests.data.stores import VOCAB, make_plan, make_sources
from tests.training.runs import LENGTH, run
from tests.weights.conftest import original, saved  # noqa: F401


@pytest.fixture(scope="session")
def loader(tmp_path_factory):
  sources = make_sources(tmp_path_factory.mktemp("stores"))
  return RowLoader(make_plan(sources, sequence_length=LENGTH), VOCAB)


@pytest.fixture(scope="session")
def whole(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  summary = run(folder, loader)
  return folder, summary
