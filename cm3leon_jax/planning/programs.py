"""Lowers the programs that are compiled ahead of time: train step, evaluation, guided decoder."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import PyTree
import numpy as np
import numpy.typing as npt

from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.config.training import on_mesh
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.data.rows.loader import FIELDS
from cm3leon_jax.decoding import request
from cm3leon_jax.decoding.generator import GeneratorConfig
from cm3leon_jax.decoding.params import DecodeParams, prepare
from cm3leon_jax.decoding.programs import Lowered, lower_batch
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import abstract, batch_shards, spec
from cm3leon_jax.models import groups, transformer
from cm3leon_jax.training.step import grpo
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import Steps, compile_steps


def count_params(settings: Settings, mesh: jax.sharding.Mesh) -> int:
  with jax.set_mesh(mesh):
    # The key is created inside the function, because the devices of `mesh` cannot run anything.
    init = jax.eval_shape(lambda: transformer.init_params(settings.model, jax.random.key(0)))
    return transformer.count_params(init)


def train_step(settings: Settings, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """Lowers the step that `cm3leon train` runs on `mesh` with this config.

  Raises:
    UserError: the batch is not evenly divisible among the devices of the mesh.
  """
  with jax.set_mesh(mesh):
    steps, state = _steps(settings, mesh)
    batch = _batch(settings, mesh, settings.train.global_batch_size)
    train: jax.stages.Wrapped = steps.train
    count, more = num_sources(settings, "train"), _base(settings, mesh)
    return train.lower(state, batch, num_sources=count, **more)


def policy_step(settings: Settings, mesh: jax.sharding.Mesh, prompts: int) -> jax.stages.Lowered:
  """Lowers the update of `cm3leon reinforce` on `mesh`, for images with two streams each.

  `train.global_batch_size` counts samples. `prompts` is the number of tokens in both prompts of a
  sample.

  Raises:
    UserError: the batch is not evenly divisible among the devices of the mesh.
  """
  train = dataclasses.replace(settings.train, only=())  # All parameters are trained.
  settings = dataclasses.replace(settings, adapter=AdapterConfig(), train=train)
  with jax.set_mesh(mesh):
    _, state = _steps(settings, mesh)
    reference = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, settings.model.dtype, sharding=x.sharding),
      state.params,
    )
    samples, codes = settings.train.global_batch_size, settings.vqgan.image_tokens
    rows = (samples, grpo.row_length(prompts, 2, codes))

    def array(shape: tuple[int, ...], dtype: npt.DTypeLike = np.int32) -> jax.ShapeDtypeStruct:
      sharding = NamedSharding(mesh, spec("batch", *[None] * (len(shape) - 1)))
      return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = array(rows)
    rollout = grpo.Rollout(
      inputs,
      inputs,
      inputs,
      array((samples, codes)),
      array((samples, codes, 2), np.float32),
      array((samples,), np.float32),
    )
    step: jax.stages.Wrapped = grpo.compile_step(
      settings.model,
      settings.optimizer,
      settings.reinforce,
      settings.train.steps,
      settings.vocab.text_size,
    )
    return step.lower(state, reference, rollout)


def evaluation(settings: Settings, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, int]:
  """Lowers the program of `cm3leon train` for the held-out loss of one micro-batch on `mesh`.

  Returns (program, bytes per device of the state that stays in memory although the program does not
  use it). This state is the optimizer state, and the parameters if their average is evaluated.

  Raises:
    UserError: see `train_step`.
  """
  with jax.set_mesh(mesh):
    steps, state = _steps(settings, mesh)
    rows = on_mesh(settings.train, batch_shards()).micro_batch_size
    batch = _batch(settings, mesh, rows)
    rest = (state.opt_state, None if state.ema is None else state.params)
    count = num_sources(settings, "heldout")
    evaluate: jax.stages.Wrapped = steps.evaluate
    more = _base(settings, mesh)
    lowered = evaluate.lower(state.eval_params, batch, num_sources=count, **more)
    return lowered, _local_bytes(rest)


def _steps(settings: Settings, mesh: jax.sharding.Mesh) -> tuple[Steps, TrainState]:
  """Returns the jitted functions of a run on the current mesh, and the types of its train state."""
  train = on_mesh(settings.train, batch_shards())
  sections = settings.model, settings.optimizer, train, settings.vocab, settings.seed
  steps = compile_steps(*sections, settings.tuned)
  return steps, abstract(jax.eval_shape(steps.init), mesh)


def _base(settings: Settings, mesh: jax.sharding.Mesh) -> dict[str, dict]:
  """Returns {"base": types of the frozen parameters}, or {} if all parameters are trained."""
  if settings.tuned is None:
    return {}
  return {"base": groups.rest(_computing_params(settings, mesh), settings.tuned)}


def _computing_params(settings: Settings, mesh: jax.sharding.Mesh) -> dict:
  """Returns the types of the parameters in the compute dtype."""

  def init() -> dict:
    params = transformer.init_params(settings.model, jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(jnp.dtype(settings.model.dtype)), params)

  return abstract(jax.eval_shape(init), mesh)


def _batch(
  settings: Settings, mesh: jax.sharding.Mesh, rows: int
) -> dict[str, jax.ShapeDtypeStruct]:
  shape = (rows, settings.data.sequence_length)
  sharding = NamedSharding(mesh, spec("batch", "length"))
  fields = dict(FIELDS)
  if settings.instructions.any:
    fields["sources"] = np.int32
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in fields.items()
  }


def num_sources(settings: Settings, split: str) -> int:
  """Returns how many sources the rows of "train" or "heldout" can have; 0 without instructions."""
  if not settings.instructions.any:
    return 0
  tasks = load_tasks(settings.instructions)
  count = sum(split == "train" or bool(task.heldout) for task in tasks)
  if settings.instructions.replay_share:
    mixtures = [one.data for _, one in settings.phases()]
    count += 1 + any(x.text_share for x in mixtures) + any(x.interleaved_share for x in mixtures)
  return count


def guided_decoder(
  settings: Settings, mesh: jax.sharding.Mesh, prompts: int, positions: int
) -> tuple[Lowered, int, int]:
  """Lowers the programs of `Generator` for text-to-image prompts with two guidance streams.

  Parameters are in the compute dtype, as on a server. `prompts` is the number of prompts.
  `positions` is the number of positions per sample, of which the prompt takes all that the image
  leaves free.

  Returns (programs, bytes of the parameters that a device reads per step, bytes of the largest
  cache per device). These parameters are the blocks and the image rows of the output table.

  Raises:
    UserError: `positions` leaves no space for a prompt, or the prompts are not evenly divisible
      among the devices.
  """
  vocab, image_tokens = settings.vocab, settings.vqgan.image_tokens
  make = functools.partial(request.text_to_image, vocab, image_tokens)
  words = positions - make([vocab.num_special]).positions + 1
  if words < 1:
    raise UserError(
      f"--decode_positions is {positions}, but an image and its end take {image_tokens + 1} "
      "positions: increase it to leave space for a prompt."
    )
  rng = np.random.default_rng(0)
  captions = rng.integers(vocab.num_special, vocab.text_size, (prompts, words), np.int32)
  with jax.set_mesh(mesh):
    if prompts % batch_shards():
      raise UserError(
        f"--decode_batch is {prompts}; it must be a multiple of mesh.data x mesh.fsdp x "
        f"mesh.fsdp_inner = {batch_shards()}."
      )
    config = GeneratorConfig.of(settings, batch_size=prompts)
    batch, static = config.batch([make(c) for c in captions], range(prompts))
    params = _decode_params(settings, mesh)
    lowered = lower_batch(mesh, params, batch, static)
  weights = _local_bytes((params.model["blocks"], params.image_head))
  return lowered, weights, _local_bytes(lowered.state.cache)


def _decode_params(settings: Settings, mesh: jax.sharding.Mesh) -> DecodeParams:
  """Returns the types of the arrays in `DecodeParams`."""

  def init() -> DecodeParams:
    params = transformer.init_params(settings.model, jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(settings.model.dtype)), params)
    return prepare(params, config=settings.model, vocab=settings.vocab)

  return abstract(jax.eval_shape(init), mesh)


def _local_bytes(tree: PyTree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
