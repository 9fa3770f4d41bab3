"""Runs a tiny training, and crashes it during a step."""

import functools
import time
from unittest import mock

from etils import epath
import jax
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.training import OptimizerConfig, TrainConfig
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training import decoder
from cm3leon_jax.training.decoder import DecoderTraining, train
from cm3leon_jax.training.objective import RowObjective
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import init_state
from cm3leon_jax.training.steps import compile_steps
from cm3leon_jax.weights import checkpoint, reading
from tests.data.stores import VOCAB
from tests.models.tiny import SIZES, mesh_of

MODEL = ModelConfig(vocab_size=VOCAB.size, max_positions=128, loss_chunk=32, **SIZES)
STEPS, LENGTH = 12, 64  # Number of steps of a run, and length of a row.


@functools.cache
def shared_steps(model, optimizer, accumulation, vocab, seed, mesh, tuned=None):
  """Compiles the steps once for all runs, because compiling takes most of the time.

  The learning rate schedule is that of `STEPS` steps.
  """
  config = TrainConfig(
    steps=STEPS, gradient_accumulation_steps=accumulation, global_batch_size=accumulation
  )
  return compile_steps(model, optimizer, config, vocab, seed, tuned)


def run(
  folder,
  loader,
  shape=(1, 1, 1),
  sample_grid=None,
  learning_rate=1e-2,
  profile_steps=range(0),
  fresh=False,
  ema_decay=0.0,
  initial_params=None,
  skip_above=0.0,
  skipped=(),
  tuned=None,
  frozen_params=None,
  **fields,
):
  """Trains a tiny decoder. `fresh` compiles the steps again, as in a new process."""
  usual = {"steps": STEPS, "global_batch_size": 8, "eval_every": 5, "eval_batches": 1}
  config = TrainConfig(**{**usual, "checkpoint_every": 4, **fields})
  optimizer = OptimizerConfig(
    learning_rate=learning_rate, ema_decay=ema_decay, skip_above=skip_above
  )

  def steps(model, optimizer, config, vocab, seed, tuned):
    mesh, accumulation = jax.sharding.get_mesh(), config.gradient_accumulation_steps
    return shared_steps(model, optimizer, accumulation, vocab, seed, mesh, tuned)

  with (
    jax.set_mesh(mesh_of(*shape)),
    mock.patch.object(decoder, "compile_steps", compile_steps if fresh else steps),
  ):
    training = DecoderTraining(
      folder=epath.Path(folder),
      model=MODEL,
      optimizer=optimizer,
      config=config,
      vocab=VOCAB,
      objective=RowObjective(loader, skipped),
      heldout=loader,
      seed=0,
      sample_grid=sample_grid,
      profile_steps=profile_steps,
      initial_params=initial_params,
      tuned=tuned,
      frozen_params=frozen_params,
    )
    return train(training)


def losses(folder):
  lines = read_json_lines(folder / "metrics" / "metrics.jsonl")
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


class Crash(Exception):
  """Simulates a machine that fails during a step."""


def crash_at(step, folder):
  """Returns a function that crashes in `step`, after the thread of the last save has ended."""

  def crash(_, at):
    if at == step:
      while any("tmp" in path.name for path in (folder / checkpoint.FOLDER).iterdir()):
        time.sleep(0.05)
      raise Crash

  return crash


def arrays(folder):
  """Returns the parameters of the last checkpoint, and their average."""
  with jax.set_mesh(mesh_of(1, 1, 1)):
    optimizer = create_optimizer(OptimizerConfig(), STEPS)
    init = functools.partial(init_state, MODEL, optimizer, jax.random.key(0), averaged=True)
    checkpoints = checkpoint.Checkpoints(folder, 2)
    state, _ = checkpoints.restore(jax.eval_shape(init), checkpoints.newest())
    checkpoints.close()
    return state.params, reading.load_params(folder, MODEL)[0]


def assert_equal(*trees):
  jax.tree.map(np.testing.assert_array_equal, *trees)
