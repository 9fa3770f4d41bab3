"""Compiles the programs of running batches, as `decoding.programs` does for other batches."""

from collections.abc import Callable
import functools

import jax
import numpy as np

from cm3leon_jax.decoding.continuous import state as state_lib
from cm3leon_jax.decoding.continuous.state import Admitted, BatchState
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.params import DecodeParams
from cm3leon_jax.decoding.programs import Programs, Static, jit_before, lower_loop
from cm3leon_jax.mesh import abstract


def empty_batch(
  programs: Programs,
  params: DecodeParams,
  control: Control,
  static: Static,
  chunk: int,
  least: int,
) -> tuple[BatchState, jax.stages.Compiled]:
  """Makes an empty batch for the slots of `control`.

  `chunk` is the largest number of steps per call. `least` is as in `state.steps`. From the start,
  the cache has capacity for all `static.max_new_tokens` generated tokens. Returns (state, program
  of its next steps).
  """
  function = functools.partial(
    state_lib.empty,
    config=static.model,
    grammar=static.grammar,
    slots=len(control.seeds),
    widths=static.widths,
    max_new_tokens=static.max_new_tokens,
    steps=chunk,
    cache_dtype=static.cache_dtype,
  )

  def make() -> tuple[Callable, jax.stages.Compiled]:
    state, limit = jax.eval_shape(function), np.int32(0)
    types = [abstract(x, programs.mesh) for x in (params, control, state, limit)]
    program = lower_loop(programs.mesh, _steps(static, least), *types).compile()
    return jit_before(function, program), program

  jitted, program = programs.once(("running batch", static, chunk, least), (params, control), make)
  return jitted(), program


def steps_of_first_slots(
  programs: Programs,
  slots: int,
  state: BatchState,
  params: DecodeParams,
  control: Control,
  program: jax.stages.Compiled,
  static: Static,
  least: int,
) -> jax.stages.Compiled:
  """Compiles a program for the steps of only the first `slots` slots of a batch.

  The state has the memory layout of `program`, which runs the steps of all slots.
  """

  def make() -> jax.stages.Compiled:
    types = [abstract(x, programs.mesh) for x in (params, control, state, np.int32(0))]
    formats = program.input_formats[0][2]
    steps = _steps(static, least, slots=slots)
    return lower_loop(programs.mesh, steps, *types, formats=formats).compile()

  return programs.once(("first slots", slots, static, least), (params, control, state), make)


def admit(
  programs: Programs,
  state: BatchState,
  admitted: Admitted,
  params: DecodeParams,
  program: jax.stages.Compiled,
  static: Static,
) -> BatchState:
  """Runs `state.admit`, which donates `state`. The result has the memory layout of `program`."""

  def make() -> Callable:
    function = functools.partial(
      state_lib.admit,
      config=static.model,
      grammar=static.grammar,
      cache_dtype=static.cache_dtype,
    )
    return jax.jit(function, donate_argnums=1, out_shardings=program.input_formats[0][2])

  jitted = programs.once(("admit", static), (params.model, state, admitted), make)
  return jitted(params.model, state, admitted)


def _steps(static: Static, least: int, slots: int | None = None) -> Callable:
  return functools.partial(state_lib.steps, least=least, slots=slots, **static.of_step)
