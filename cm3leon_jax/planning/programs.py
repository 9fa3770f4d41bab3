"""Lowers the programs that are compiled ahead of time: train step, evaluation, guided decoder."""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.pipeline import FIELDS
from cm3leon_jax.decoding import decode, grammar, programs, weights
from cm3leon_jax.decoding import prompts as prompts_lib
from cm3leon_jax.decoding.batch import BUCKET, rounded
from cm3leon_jax.mesh import abstract, batch_shards, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.training.train import check_batch, compile_steps

STREAMS = 2  # Guidance: conditional and unconditional.


def count_params(settings, mesh: jax.sharding.Mesh) -> int:
  """Parameters of the config's decoder."""
  with jax.set_mesh(mesh):
    return transformer.count_params(
      jax.eval_shape(lambda: transformer.init_params(settings.model, jax.random.key(0)))
    )


def train_step(settings, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """Lowers the step that `launch.train` runs on `mesh` with this config.

  Raises:
    UserError: the mesh cannot split the batch.
  """
  with jax.set_mesh(mesh):
    steps, state = _steps(settings, mesh)
    return steps.train.lower(state, _batch(settings, mesh, settings.train.global_batch_size))


class Evaluation(NamedTuple):
  """The held-out loss of one micro-batch.

  Attributes:
    step: the program, lowered.
    optimizer_bytes: a device's part of the optimizer's state, which stays in memory meanwhile.
  """

  step: jax.stages.Lowered
  optimizer_bytes: int


def evaluation(settings, mesh: jax.sharding.Mesh) -> Evaluation:
  """Lowers the held-out loss that `launch.train` computes on `mesh`; raises as `train_step`."""
  with jax.set_mesh(mesh):
    steps, state = _steps(settings, mesh)
    batch = _batch(settings, mesh, settings.train.micro_batch_size)
    return Evaluation(steps.evaluate.lower(state.params, batch), _local_bytes(state.opt_state))


def _steps(settings, mesh: jax.sharding.Mesh):
  """The jitted functions of a run on the current mesh, and the types of its state."""
  check_batch(settings.train)
  steps = compile_steps(
    settings.model, settings.optimizer, settings.train, settings.vocab, settings.seed
  )
  return steps, abstract(jax.eval_shape(steps.init), mesh)


def _batch(settings, mesh: jax.sharding.Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  shape = (rows, settings.data.sequence_length)
  sharding = NamedSharding(mesh, spec("batch", "length"))
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in FIELDS.items()
  }


class Decoder(NamedTuple):
  """The two programs of `Generator`.

  Attributes:
    advance: the loop of steps, lowered.
    prefill: makes the program before it, lowered, from the compiled loop, whose layouts it must give.
    weight_bytes: of the parameters that a device reads in a step: the blocks, and the image rows of the output table.
    cache_bytes: of a device's part of the cache.
  """

  advance: jax.stages.Lowered
  prefill: Callable[[jax.stages.Compiled], jax.stages.Lowered]
  weight_bytes: int
  cache_bytes: int


def guided_decoder(settings, mesh: jax.sharding.Mesh, prompts: int, positions: int) -> Decoder:
  """What `Generator` runs for captions of `prompts` pictures, two streams each.

  Parameters are in the compute dtype, as a server would hold them.

  Args:
    settings: of the config.
    mesh: what the programs run on.
    prompts: B.
    positions: cache slots, prompt and image together.
  """
  vocab, image_tokens = settings.vocab, settings.vqgan.image_tokens
  request = prompts_lib.text_to_image(vocab, image_tokens, [vocab.num_special])
  longest = grammar.longest(request.plan)
  slots = positions - longest
  if slots < 1:
    raise UserError(
      f"--decode_positions is {positions}; an image and its end take {longest} of them, the prompt the rest."
    )
  static = {"config": settings.model, "grammar": grammar.Grammar(vocab, image_tokens)}
  with jax.set_mesh(mesh):
    if prompts % batch_shards():
      raise UserError(
        f"--decode_batch is {prompts}; mesh.data x mesh.fsdp x mesh.fsdp_inner = {batch_shards()} must divide it."
      )
    dtype = jnp.dtype(settings.model.dtype)
    params = lambda: jax.tree.map(
      lambda x: x.astype(dtype), transformer.init_params(settings.model, jax.random.key(0))
    )
    made = abstract(
      jax.eval_shape(lambda: weights.prepare(params(), config=settings.model, vocab=vocab)), mesh
    )
    ids, control = (abstract(x, mesh) for x in _inputs(settings, request, prompts, slots))
    begin = functools.partial(
      decode.begin, longest=longest, room=longest, widths=(slots, BUCKET), **static
    )
    loop = abstract(jax.eval_shape(begin, made.params, ids, control.plan), mesh)
    sampler = decode.Sampler.of(settings.sampling)
    advance = programs.lower_advance(
      mesh, made, control, loop, sampler=sampler, steps=longest, **static
    )

  def prefill(compiled: jax.stages.Compiled) -> jax.stages.Lowered:
    with jax.set_mesh(mesh):
      return jax.jit(begin, out_shardings=compiled.input_formats[0][2]).lower(
        made.params, ids, control.plan
      )

  return Decoder(
    advance,
    prefill,
    _local_bytes((made.params["blocks"], made.image_head)),
    _local_bytes(loop.cache),
  )


def _inputs(settings, request, prompts: int, slots: int):
  """Host arrays of the right shapes: (decode.Prompts, decode.Control). The unconditional prompt of all is one more."""
  unique, rows = rounded(prompts + 1, batch_shards()), STREAMS * prompts
  ids = decode.Prompts(
    prefixes=None,
    rests=(np.zeros((unique, slots), np.int32), np.zeros((unique, slots), bool)),
    prefix_of=np.zeros(unique, np.int32),
    row=np.zeros(rows, np.int32),
    last=np.zeros(rows, np.int32),
  )
  control = decode.Control(
    plan=grammar.plan_array([request.plan] * prompts),
    guidance=np.stack([request.guidance(settings.sampling, settings.vqgan.image_tokens)] * prompts),
    seeds=np.zeros(prompts, np.uint32),
    contrastive=np.zeros(prompts, bool),
    values=settings.sampling.values,
  )
  return ids, control


def _local_bytes(tree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
