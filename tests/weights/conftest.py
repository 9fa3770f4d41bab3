"""Makes checkpoints for tests to damage."""

import shutil

import jax
import pytest

from cm3leon_jax.weights import checkpoint
from tests.models.tiny import mesh_of
from tests.weights.saved import fresh


@pytest.fixture(scope="session")
def original(tmp_path_factory):
  """Saves two checkpoints on a (1, 1, 1) mesh; their states are initialized from seeds 1 and 2."""
  folder = tmp_path_factory.mktemp("original")
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    for step in (1, 2):
      checkpoints.save(fresh(step), step, next_row=8 * step)
    checkpoints.close()
  return folder


@pytest.fixture
def saved(original, tmp_path):
  return shutil.copytree(original, tmp_path / "saved")
