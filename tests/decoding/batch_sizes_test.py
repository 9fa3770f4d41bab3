"""Traces programs for 1, 2, 3 and 8 samples of 1 to 3 streams, on one device and on 8 devices.

Tracing suffices: on a mesh with explicit axes, JAX checks shardings while it traces.
"""

# B samples, S guidance streams, R = B x S rows.

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cm3leon_jax.decoding import loop
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.continuous import state as state_lib
from cm3leon_jax.decoding.continuous.buckets import bucket_of
from cm3leon_jax.decoding.continuous.slots import ActiveRequest, RunningBatch
from cm3leon_jax.mesh import abstract, batch_shards
from tests.decoding.small import CODES, IMAGE, MIXTURE, VOCAB, A, B, on_mesh, small_generator

ROWS = {1: 1, 2: 2, 3: 4, 8: 8}  # Number of samples on a device -> number of rows in its program.
SIZES = (1, 2, 3, 8)
REQUESTS = {  # Of one, two and three streams.
  "image": request_lib.text_to_image(VOCAB, IMAGE, A),
  "unconditional": request_lib.unconditional(VOCAB, IMAGE),
  "edit": request_lib.edit(VOCAB, IMAGE, A, CODES, B),
}


@pytest.fixture(
  scope="module",
  params=[pytest.param((1, 1, 1), marks=pytest.mark.slow), (1, 8, 1)],
  ids=["one device", "8 shards of the batch"],
)
def generator(request):
  with on_mesh(*request.param):
    yield small_generator(sampling=MIXTURE)


def typed(tree):
  """Returns the type of each array, e.g. "int32[8@(data,fsdp,fsdp_inner),7]", with its sharding."""
  return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


def types_of(generator, request, size: int, **fields):
  """Returns (static arguments, types of (params, Prompts, Control)) for `size` equal requests."""
  config = dataclasses.replace(generator.config, **fields)
  batch, static = config.batch([request] * size, range(size))
  types = generator.params, batch.prompts, batch.control
  return static, [abstract(x, jax.sharding.get_mesh()) for x in types]


def batches_of(generator, request, **fields):
  """Yields the results of `types_of` for each batch size, without repeating equal types."""
  seen = []
  for size in SIZES:
    static, types = types_of(generator, request, size, **fields)
    # Each device has as many rows as its samples need, rounded up to a power of two. It reads equal
    # prompts only once.
    shards, streams = batch_shards(), len(request.streams)
    _, prompts, control = types
    assert control.seeds.shape == (shards * ROWS[-(-size // shards)],)
    assert prompts.last.shape == (control.seeds.shape[0] * streams,)
    assert prompts.rests.ids.shape[0] == shards * ROWS[streams]
    if typed(types) not in seen:
      seen.append(typed(types))
      yield static, types


def prefilled(static, params, prompts, control):
  """Returns the types of the decoding state after the prompts are read."""
  prefill = functools.partial(loop.prefill, static=static)
  return jax.eval_shape(prefill, params.model, prompts, control.plan)


@pytest.mark.parametrize("task", REQUESTS)
def test_batches_of_any_task(generator, task):
  for static, (params, prompts, control) in batches_of(generator, REQUESTS[task]):
    state = prefilled(static, params, prompts, control)
    steps = functools.partial(loop.decode_steps, static=static, steps=2)
    assert typed(jax.eval_shape(steps, params, control, state)) == typed(state)
    jax.eval_shape(loop.results, jax.eval_shape(functools.partial(loop.grow, by=3), state))


@pytest.mark.slow
def test_a_running_batch(generator):
  """Admits one sample per shard, then a sample per slot. Steps use all slots or only the first."""
  of_shard, task = 4, "image"
  bucket = bucket_of(REQUESTS[task], MIXTURE, generator)
  slots = of_shard * batch_shards()
  batch = RunningBatch(bucket, generator, slots, chunk=3, shards=batch_shards())
  for ticket in range(slots):
    batch.admit(ActiveRequest(ticket, REQUESTS[task], ticket, MIXTURE))
  static = bucket.static
  empty = functools.partial(state_lib.empty, static=static, slots=slots, steps=3)
  state = jax.eval_shape(empty)
  admit = functools.partial(state_lib.admit, static=static)
  control = abstract(batch.control, jax.sharding.get_mesh())
  everyone = [*range(slots)]
  for chosen in ([slot if slot % of_shard == 0 else None for slot in everyone], everyone):
    admitted = batch._admitted(chosen[:: 1 if chosen is everyone else of_shard])
    assert typed(jax.eval_shape(admit, generator.params.model, state, admitted)) == typed(state)
  for first in [None, 1] if batch.few else [None]:
    steps = functools.partial(state_lib.steps, static=static, least=1, slots=first)
    after = jax.eval_shape(steps, generator.params, control, state, np.int32(2))
    assert typed(after) == typed(state)
