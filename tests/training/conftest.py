"""Rows, a run that nothing interrupts, and checkpoints to damage."""

import shutil

import jax
import pytest

from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.training.checkpoints import checkpoint
from tests.data.stores import VOCAB, make_plan, make_sources
from tests.models.tiny import mesh_of
from tests.training.runs import LENGTH, run
from tests.training.saved import fresh


@pytest.fixture(scope="session")
def loader(tmp_path_factory):
  sources = make_sources(tmp_path_factory.mktemp("stores"))
  return RowLoader(make_plan(sources, sequence_length=LENGTH), VOCAB)


@pytest.fixture(scope="session")
def whole(loader, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  summary = run(folder, loader)
  return folder, summary


@pytest.fixture(scope="session")
def original(tmp_path_factory):
  """Two checkpoints made on a (1, 1, 1) mesh, of the states of seeds 1 and 2."""
  folder = tmp_path_factory.mktemp("original")
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    for step in (1, 2):
      checkpoints.save(fresh(step), step, next_row=8 * step)
    checkpoints.close()
  return folder


@pytest.fixture
def saved(original, tmp_path):
  """A copy of them, for the test to damage."""
  return shutil.copytree(original, tmp_path / "saved")
