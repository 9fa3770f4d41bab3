"""Compiles the programs of decoding, for `Generator` and for ahead-of-time compilation."""

from collections.abc import Callable, Hashable
import functools
from typing import NamedTuple, TypeVar

import jax
from jax.experimental.layout import Format, Layout
from jaxtyping import PyTree

from cm3leon_jax.decoding import loop as loop_lib
from cm3leon_jax.decoding.batch import Batch
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.loop import LoopState, Static
from cm3leon_jax.decoding.params import DecodeParams
from cm3leon_jax.mesh import abstract
from cm3leon_jax.models.products import Transposed
from cm3leon_jax.xla_options import DECODE_OPTIONS, TRANSPOSED_OPTIONS, compiler_options

# Initial capacity of a cache for generated tokens. It is small because attention also reads empty
# entries.
CAPACITY = 128
T = TypeVar("T")
# Number of steps per call. After each call, the progress bar moves, and a finished batch ends.
CHUNK = 64


def cache_capacities(prompt: int, max_new_tokens: int) -> tuple[int, ...]:
  """Returns the successive capacities of a growing cache for generated tokens.

  The total number of entries (prompt and generated tokens) doubles each time. If the largest cache
  has at most 1.5 times the entries of the next cache, it is used instead of the next cache.

  >>> cache_capacities(32, 257), cache_capacities(32, 1_025), cache_capacities(896, 257)
  ((128, 257), (128, 288, 608, 1025), (257,))
  """
  capacities, entries = [], prompt + CAPACITY
  while 3 * entries < 2 * (prompt + max_new_tokens):
    capacities.append(entries - prompt)
    entries *= 2
  return (*capacities, max_new_tokens)


def lower_steps(
  mesh: jax.sharding.Mesh, params: DecodeParams, control: Control, loop: LoopState, static: Static
) -> jax.stages.Lowered:
  """Lowers `loop.decode_steps` for abstract arguments (see `mesh.abstract`)."""
  steps = functools.partial(loop_lib.decode_steps, static=static, steps=CHUNK)
  return lower_loop(mesh, steps, params, control, loop)


def lower_loop(
  mesh: jax.sharding.Mesh,
  function: Callable,
  params: DecodeParams,
  control: Control,
  state: PyTree,
  *others: PyTree,
  formats: PyTree = None,
) -> jax.stages.Lowered:
  """Lowers a function of (params, control, state, *others) that runs steps and returns the state.

  `formats` are the memory layouts of the state. If they are None, the compiler chooses them. With
  the default layout, XLA:TPU would copy the whole cache to the loop's preferred layout and back in
  every call.
  """

  def shardings(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.sharding, tree)

  if formats is None:
    formats = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), state)
  options = TRANSPOSED_OPTIONS if isinstance(params.head, Transposed) else DECODE_OPTIONS
  jitted = jax.jit(
    function,
    in_shardings=(shardings(params), shardings(control), formats, *map(shardings, others)),
    out_shardings=formats,
    donate_argnums=2,
    compiler_options=compiler_options(mesh, options),
  )
  return jitted.lower(params, control, state, *others)


def jit_before(function: Callable, program: jax.stages.Compiled) -> jax.stages.Wrapped:
  """Jits a function that returns a state in the memory layout of `program`, which runs next."""
  return jax.jit(function, out_shardings=program.input_formats[0][2])


class Lowered(NamedTuple):
  """Lowered programs of a batch for ahead-of-time compilation.

  Attributes:
    steps: lowered decoding loops with the initial and with the largest cache. They are the same
      program if the cache does not grow.
    prefill: a function that returns the lowered prefill, given the compiled loop with the initial
      cache.
    state: abstract state with the largest cache.
  """

  steps: tuple[jax.stages.Lowered, jax.stages.Lowered]
  prefill: Callable[[jax.stages.Compiled], jax.stages.Lowered]
  state: LoopState


def lower_batch(
  mesh: jax.sharding.Mesh, params: DecodeParams, batch: Batch, static: Static
) -> Lowered:
  """Lowers the programs that `Programs` runs for a batch.

  `mesh` must be the current mesh; its devices need not be present. `params` are abstract.
  """
  prompts, control = (abstract(x, mesh) for x in (batch.prompts, batch.control))
  arguments = params.model, prompts, control.plan
  first = functools.partial(loop_lib.prefill, static=static)
  state = abstract(jax.eval_shape(first, *arguments), mesh)
  lowered = last = lower_steps(mesh, params, control, state, static)
  if grown := static.capacities[-1] - static.capacities[0]:
    grow = functools.partial(loop_lib.grow, by=grown)
    state = abstract(jax.eval_shape(grow, state), mesh)
    last = lower_steps(mesh, params, control, state, static)

  def lower_prefill(program: jax.stages.Compiled) -> jax.stages.Lowered:
    with jax.set_mesh(mesh):
      return jit_before(first, program).lower(*arguments)

  return Lowered((lowered, last), lower_prefill, state)


class Programs:
  """Compiled programs on a mesh, which must be the current mesh.

  Each program is compiled once per set of argument shapes, dtypes, shardings and static arguments.
  To generate a batch, call `prefill`, then the program of steps that `prefill` or `grow` returned,
  then `results`.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self.mesh = mesh
    self.results = jax.jit(loop_lib.results)
    self.compiled: dict = {}

  def prefill(
    self, params: DecodeParams, batch: Batch, static: Static
  ) -> tuple[LoopState, jax.stages.Compiled]:
    """Reads the prompts of a batch. Returns (state, program of its next steps)."""
    function = functools.partial(loop_lib.prefill, static=static)
    arguments = params.model, batch.prompts, batch.control.plan
    return self._run_before(function, arguments, static, params, batch.control, static)

  def grow(
    self, loop: LoopState, by: int, params: DecodeParams, control: Control, static: Static
  ) -> tuple[LoopState, jax.stages.Compiled]:
    """Runs `loop.grow`. Returns (state, program of its next steps)."""
    function = functools.partial(loop_lib.grow, by=by)
    return self._run_before(function, (loop,), (by, static), params, control, static)

  def _run_before(
    self,
    function: Callable,
    arguments: tuple,
    name: Hashable,
    params: DecodeParams,
    control: Control,
    static: Static,
  ) -> tuple[LoopState, jax.stages.Compiled]:
    """Runs a function that returns a state. The state has the memory layout for the next steps.

    Returns (state, program of its next steps).
    """

    def make() -> tuple[Callable, jax.stages.Compiled]:
      state = jax.eval_shape(function, *arguments)
      types = tuple(abstract(x, self.mesh) for x in (params, control, state))
      of_params, of_control, of_state = types
      program = self.once(
        ("steps", static.model, static.grammar, static.sampler),
        types,
        lambda: lower_steps(self.mesh, of_params, of_control, of_state, static).compile(),
      )
      return jit_before(function, program), program

    jitted, program = self.once(name, (arguments, params, control), make)
    return jitted(*arguments), program

  def once(self, name: Hashable, arguments: PyTree, make: Callable[[], T]) -> T:
    """Returns `make()`, cached by the name and the shapes, dtypes and shardings of `arguments`."""
    leaves, structure = jax.tree.flatten(arguments)
    types = tuple((x.shape, str(x.dtype), getattr(x, "sharding", None)) for x in leaves)
    key = (name, structure, types)
    if key not in self.compiled:
      self.compiled[key] = make()
    return self.compiled[key]


@functools.cache
def programs_of(mesh: jax.sharding.Mesh) -> Programs:
  """Returns the compiled programs for a mesh. All generators on the mesh share them."""
  return Programs(mesh)
