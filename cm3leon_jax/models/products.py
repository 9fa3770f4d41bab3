"""Multiplies activations by matrices, in ways that are fast on CPUs."""

# B batch, L length, D width, N heads, H head size, F feed-forward.

from collections.abc import Sequence
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from cm3leon_jax.mesh import spec

FEW_ROWS = 64  # Products of more rows take about as long in any order.


class Transposed(NamedTuple):
  """A matrix that is stored with the axes of its outputs first, for few rows on CPUs.

  YNNPACK multiplies few rows up to 1.5 times as fast if the matrix is its left operand. The matrix
  of "BLD,DF->BLF" is stored as [F, D], that of "BLNh,NhD->BLD" as [D, N, h].
  """

  stored: Any  # An array, or `decoding.params.Int8`.


def product(equation: str, x: Array, w: Array | Transposed, axes: Sequence[str | None]) -> Array:
  """Computes `einsum(equation, x, w)`. `axes` are the logical axes of the result.

  The equation multiplies the last axes of the activations `x` by the first axes of the matrix `w`,
  for example "BLD,DF->BLF" or "BLNh,NhD->BLD". On CPUs, the gradient of `w` has other rounding
  errors than that of `einsum`.
  """
  if isinstance(w, Transposed):
    return by_transposed(equation, x, w, axes, x.dtype)
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "cpu":
    return _on_cpu(equation, spec(*axes), x, w)
  return jnp.einsum(equation, x, w, out_sharding=spec(*axes))


def by_transposed(
  equation: str, x: Array, w: Transposed, axes: Sequence[str | None], dtype: DTypeLike
) -> Array:
  """Computes `product` in `dtype`. For few rows, the matrix is the left operand."""
  of_x, of_w, of_y = re.split(",|->", equation)
  rows = "".join(letter for letter in of_x if letter not in of_w)
  outputs, few = of_y.removeprefix(rows), math.prod(x.shape[: len(rows)]) <= FEW_ROWS
  result = outputs + rows if few else of_y
  equation = f"{outputs}{of_x.removeprefix(rows)},{of_x}->{result}"
  split = spec(*(axes[of_y.index(letter)] for letter in result))
  y = jnp.einsum(equation, w.stored, x, preferred_element_type=dtype, out_sharding=split)
  return jnp.moveaxis(y, range(len(outputs)), range(-len(outputs), 0)) if few else y


# JAX multiplies the cotangent by x to compute the gradient of w, and transposes the result. On CPUs
# this takes twice as long as to multiply x by the cotangent.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_cpu(equation: str, out: P, x: Array, w: Array) -> Array:
  return jnp.einsum(equation, x, w, out_sharding=out)


def _forward(equation: str, out: P, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
  return _on_cpu(equation, out, x, w), (x, w)


def _backward(
  equation: str, out: P, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  x, w = kept
  transposed = jax.linear_transpose(lambda x: jnp.einsum(equation, x, w, out_sharding=out), x)
  of_x, of_w = equation.split("->")[0].split(",")
  rows = tuple(i for i, letter in enumerate(of_x) if letter not in of_w)
  stored = jax.typeof(w).sharding.spec
  by_w = jax.lax.dot_general(
    x,
    cotangent,
    ((rows, rows), ((), ())),
    out_sharding=P(*stored.partitions, unreduced=stored.reduced),
  )
  return *transposed(cotangent), by_w


_on_cpu.defvjp(_forward, _backward)
