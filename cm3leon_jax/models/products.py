"""Multiplies activations by the matrices of a layer, with a backward pass that is fast on CPUs."""

# B batch, L length, D width, N heads, H head size, F feed-forward.

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from cm3leon_jax.mesh import spec


def product(equation: str, x: Array, w: Array, axes: Sequence[str | None]) -> Array:
  """Computes `einsum(equation, x, w)`. `axes` are the logical axes of the result.

  The equation multiplies the last axes of the activations `x` by the first axes of the matrix `w`,
  for example "BLD,DF->BLF" or "BLNh,NhD->BLD". On CPUs, the gradient of `w` has other rounding
  errors than that of `einsum`.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "cpu":
    return _on_cpu(equation, spec(*axes), x, w)
  return jnp.einsum(equation, x, w, out_sharding=spec(*axes))


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
