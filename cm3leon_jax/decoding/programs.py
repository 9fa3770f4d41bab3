"""The compiled programs of decoding, and the layouts of what goes from one to the next."""

from collections.abc import Callable
import functools

import jax
from jax.experimental.layout import Format, Layout

from cm3leon_jax.decoding import decode, jacobi
from cm3leon_jax.mesh import abstract
from cm3leon_jax.xla_options import DECODE_OPTIONS, compiler_options


def lower_advance(mesh: jax.sharding.Mesh, weights, control, loop, **static) -> jax.stages.Lowered:
  """`decode.advance` for arguments of these types, all of them `abstract`.

  The compiler chooses the layout in memory of what is carried on: with the usual one XLA:TPU copies the whole cache to the
  layout that its loop likes, and back, in every call.
  """
  auto = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), loop)
  usual = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  advance = functools.partial(decode.advance, **static)
  options = {"donate_argnums": 2, "compiler_options": compiler_options(mesh, DECODE_OPTIONS)}
  jitted = jax.jit(
    advance, in_shardings=(usual(weights), usual(control), auto), out_shardings=auto, **options
  )
  return jitted.lower(weights, control, loop)


class Programs:
  """What runs on a mesh, which has to be the current one. Compiles once for each kind of arguments.

  A run is `begin`, then `advance` with the program that `begin` or `grow` gave, then `decode.outcome`.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self.mesh = mesh
    self.outcome = jax.jit(decode.outcome)
    self._made: dict = {}

  def begin(self, weights, prompts, control, of_begin: dict, of_advance: dict):
    """Prefill.

    Args:
      weights: of `weights.prepare`.
      prompts: `decode.Prompts`.
      control: `decode.Control`.
      of_begin: static arguments of `decode.begin`.
      of_advance: static arguments of `decode.advance`.

    Returns:
      (loop, the program that advances it).
    """
    first = functools.partial(decode.begin, **of_begin)
    return self._first(
      first,
      (weights.params, prompts, control.plan),
      tuple(of_begin.items()),
      weights,
      control,
      of_advance,
    )

  def grow(self, loop, by: int, weights, control, of_advance: dict):
    """`decode.grow`. Returns (loop, the program that advances it)."""
    return self._first(
      functools.partial(decode.grow, by=by), (loop,), by, weights, control, of_advance
    )

  def draw_image(self, loop, weights, control, program, static: dict):
    """`jacobi.draw_image` with these static arguments; the loop it gives is for `program`. Returns (loop, steps)."""

    def make():
      function = functools.partial(jacobi.draw_image, **static)
      return jax.jit(function, donate_argnums=2, out_shardings=(program.input_formats[0][2], None))

    return self._once(("draw_image", tuple(static.items())), (weights, control, loop), make)(
      weights, control, loop
    )

  def _first(self, function: Callable, arguments, name, weights, control, of_advance):
    """Runs a function that makes a loop, whose arrays it lays out as the program behind it wants them."""

    def make():
      types = [
        abstract(x, self.mesh) for x in (weights, control, jax.eval_shape(function, *arguments))
      ]
      compile_it = lambda: lower_advance(self.mesh, *types, **of_advance).compile()
      program = self._once(("advance", tuple(of_advance.items())), types, compile_it)
      return jax.jit(function, out_shardings=program.input_formats[0][2]), program

    first, program = self._once(
      (name, tuple(of_advance.items())), (arguments, weights, control), make
    )
    return first(*arguments), program

  def _once(self, name, arguments, make: Callable):
    """What `make` gives, once for each name and types of arguments, and how they are split."""
    leaves, structure = jax.tree.flatten(arguments)
    key = (
      name,
      structure,
      tuple((x.shape, str(x.dtype), getattr(x, "sharding", None)) for x in leaves),
    )
    if key not in self._made:
      self._made[key] = make()
    return self._made[key]


@functools.cache
def of(mesh: jax.sharding.Mesh) -> Programs:
  """Those of a mesh: its callers share what is compiled."""
  return Programs(mesh)
