import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile

from etils import epath
import pytest

from cm3leon_jax.config.instructions import InstructionsConfig
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.config.training import ReinforceConfig
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.run.run import Run
from examples.scenes.judge import answers
from tests.examples.scenes.records import write_tasks
from tests.generation.run import make_config, make_run

SETTINGS = settings_from_config(make_config(positions=192))
NAMES = ("draw", "recolor")
GROUP, BATCH = 4, 16
_ROOT = pathlib.Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)


@functools.cache
def _tasks():
  """Writes tasks about scenes once, for all tests of the process."""
  return write_tasks(_ROOT, (*NAMES, "count"), 40, 160)


def settings_of(**fields):
  """Returns settings of a tiny run; `fields` are those of `ReinforceConfig`."""
  tasks = _tasks()
  optimizer = dataclasses.replace(SETTINGS.optimizer, learning_rate=0.01, warmup_steps=0)
  train = dataclasses.replace(SETTINGS.train, steps=12, global_batch_size=BATCH)
  reinforce = ReinforceConfig(tasks=NAMES, samples=GROUP, kl_weight=0.0, rounds=2)
  return dataclasses.replace(
    SETTINGS,
    instructions=InstructionsConfig(own_tasks=tasks, root=str(_ROOT), max_records=1),
    optimizer=optimizer,
    train=train,
    reinforce=dataclasses.replace(reinforce, **fields),
    evaluation=dataclasses.replace(SETTINGS.evaluation, judge=f"{answers.__file__}:mistakes"),
  )


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
  run = epath.Path(tmp_path_factory.mktemp("run"))
  make_run(run)
  return run


@pytest.fixture(scope="session")
def layout(workdir):
  return PromptLayout.of(Run(workdir, SETTINGS))
