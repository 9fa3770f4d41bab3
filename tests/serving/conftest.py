"""Serves a tiny run in the process of the tests."""

import pytest

from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.web.limits import Limits
from tests.serving.live import Live

LIMITS = Limits(most_samples=8, most_bytes=150_000, most_pixels=64 * 64, seconds=120.0)


@pytest.fixture(autouse=True, scope="module")
def _few_maps():
  """Overrides the fixture of tests/conftest.py, to keep the engine's programs for all modules."""


@pytest.fixture(scope="session")
def engine(model):
  engine = Engine(model.pipeline, model.mesh, slots=3, chunk=4, queue_limit=64)
  engine._pause = None  # Compiles the programs of unusual requests only when they come.
  engine.start()
  assert engine.wait_until_ready()
  yield engine
  assert engine.close(seconds=60)


@pytest.fixture(scope="session")
def live(engine, run):
  """Serves on a free port, and checks that no response contains the path of the run."""
  with Live(engine, LIMITS, secret=str(run)) as live:
    yield live


@pytest.fixture
def idle(model):
  return Engine(model.pipeline, model.mesh, slots=3, chunk=4, queue_limit=2)
