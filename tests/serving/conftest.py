"""Serves a tiny run in the process of the tests."""

from etils import epath
import jax
import pytest

from cm3leon_jax import CM3Leon
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.web.limits import Limits
from tests.generation.run import save_run
from tests.serving.live import Live

LIMITS = Limits(most_samples=8, most_bytes=150_000, most_pixels=64 * 64, seconds=120.0)


@pytest.fixture(autouse=True, scope="module")
def _few_maps():
  """Overrides the fixture of tests/conftest.py, to keep the engine's programs for all modules."""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("served"))
  save_run(root)
  return root


@pytest.fixture(scope="session")
def model(run):
  mesh = create_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  return CM3Leon.load(run, mesh=mesh)


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
