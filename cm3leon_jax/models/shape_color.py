"""Splits token tables whose image codes are pairs of a shape and a color (`shape_color`).

The row of the code (shape, color) is the sum of a vector of the shape, a vector of the color, and
0.3 times a vector of the pair. What is learned of a color through the first two holds for all
shapes. The third lets a decoder prefer two pairs without preferring the shape of one in the color
of the other. The tables are stored with one row per code, like all other tables; only the optimizer
sees the vectors.
"""

# V vocabulary, D width, T text tokens, K image codes, S shapes, C colors, K = S x C.

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cm3leon_jax.mesh import spec

# With the Adam of the tables, this is a factor of the learning rate. With 1, a decoder remembers
# which object has which color, and fewer objects are correct in colors that they never had.
PAIR_SCALE = 0.3


class Parts(NamedTuple):
  """A token table: the rows of text tokens, and the vectors of shapes, colors and pairs."""

  text: Float[Array, "T D"]
  shapes: Float[Array, "S D"]
  colors: Float[Array, "C D"]
  pairs: Float[Array, "S C D"]


def split(table: Float[Array, "V D"], start: int, colors: int) -> Parts:
  """Splits a table into the vectors of its rows.

  The vectors of colors have mean 0, and those of pairs have mean 0 over the shapes and over the
  colors. `start` (T) is the id of the first image code, and `colors` is C.
  """

  def parts(table: Float[Array, "V D"]) -> Parts:
    codes = _codes(table, start, colors)
    shapes, colored = codes.mean(1), codes.mean(0)
    colored = colored - colored.mean(0, keepdims=True)
    pairs = (codes - shapes[:, None] - colored[None]) / PAIR_SCALE
    return Parts(table[:start], shapes, colored, pairs)

  return _on_any_layout(parts, _specs())(table)


def split_gradient(gradient: Float[Array, "V D"], start: int, colors: int) -> Parts:
  """Computes the gradients of the vectors from the gradient of a table.

  The gradient of a shape or color is the sum over its codes, and that of a pair is `PAIR_SCALE`
  times that of its row.
  """

  def parts(gradient: Float[Array, "V D"]) -> Parts:
    codes = _codes(gradient, start, colors)
    return Parts(gradient[:start], codes.sum(1), codes.sum(0), PAIR_SCALE * codes)

  return _on_any_layout(parts, _specs())(gradient)


def join(parts: Parts) -> Float[Array, "V D"]:
  """Computes a table from its parts."""

  def table(parts: Parts) -> Float[Array, "V D"]:
    codes = parts.shapes[:, None] + parts.colors[None] + PAIR_SCALE * parts.pairs
    return jnp.concatenate([parts.text, codes.reshape(-1, codes.shape[-1])])

  return _on_any_layout(table, spec("vocab_stored", None))(parts)


def _specs() -> Parts:
  vectors = spec(None, "embed")
  return Parts(vectors, vectors, vectors, spec(None, None, "embed"))


def _codes(table: Float[Array, "V D"], start: int, colors: int) -> Float[Array, "S C D"]:
  return table[start:].reshape(-1, colors, table.shape[-1])


def _on_any_layout(function: Callable, specs: jax.sharding.PartitionSpec | Parts) -> Callable:
  """Lets the compiler choose the shardings inside a function. `specs` are those of its result."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  return jax.sharding.auto_axes(function, out_sharding=specs)
