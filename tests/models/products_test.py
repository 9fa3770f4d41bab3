"""Tests that products and their gradients equal those of einsum, on any mesh."""

import re

import jax
import numpy as np
import pytest

from cm3leon_jax.mesh import gathered, shard
from cm3leon_jax.models.products import FEW_ROWS, Transposed, by_transposed, product
from tests.models.tiny import mesh_of

SIZES = {"B": 8, "L": 16, "D": 24, "N": 4, "H": 6, "h": 6, "F": 40}
ROWS = ("batch", "length")
# Equation, and the axes of the matrix and of the result.
PRODUCTS = [
  ("BLD,DNH->BLNH", ("embed", "heads", "head_dim"), (*ROWS, "heads", "head_dim")),
  ("BLNh,NhD->BLD", ("heads", "head_dim", "embed"), (*ROWS, "act")),
  ("BLD,DF->BLF", ("embed", "mlp"), (*ROWS, "mlp")),
  ("BLF,FD->BLD", ("mlp", "embed"), (*ROWS, "act")),
]


def arrays(equation, dtype=np.float32):
  """Returns random activations, a matrix, and a cotangent of their product."""
  x, w, y = re.split(",|->", equation)
  rng = np.random.default_rng(0)
  return [rng.normal(size=[SIZES[a] for a in axes]).astype(dtype) for axes in (x, w, y)]


def gradients(equation, of_w, of_y):
  """Returns a function (x, w, cotangent) -> (y, gradients of x and w), and its arguments."""

  def pulled(x, w, cotangent):
    y, pull = jax.vjp(lambda x, w: product(equation, x, gathered(w), of_y), x, w)
    return y, *pull(cotangent)

  x, w, y = arrays(equation)
  of_x = ("act",) if of_w[0] == "embed" else of_w[:-1]
  return jax.jit(pulled), (shard(x, *ROWS, *of_x), shard(w, *of_w), shard(y, *of_y))


@pytest.mark.parametrize(("equation", "of_w", "of_y"), PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_products_and_their_gradients_equal_those_of_fp64(equation, of_w, of_y, shape):
  x, w, y = arrays(equation, np.float64)
  of_x, and_w, and_y = re.split(",|->", equation)
  expected = (
    np.einsum(equation, x, w),
    np.einsum(f"{and_y},{and_w}->{of_x}", y, w),
    np.einsum(f"{of_x},{and_y}->{and_w}", x, y),
  )
  with jax.set_mesh(mesh_of(*shape)):
    run, arguments = gradients(equation, of_w, of_y)
    found = run(*arguments)
    for argument, gradient in zip(arguments, found[1:]):
      assert gradient.sharding.spec == argument.sharding.spec
  for values, correct in zip(found, expected):
    np.testing.assert_allclose(values, correct, atol=3e-5)


def test_the_gradient_of_a_matrix_multiplies_rows_by_columns_on_cpus():
  """Its left matrix is [in, tokens] and its right one [tokens, out]; other layouts are slow."""
  equation, of_w, of_y = PRODUCTS[2]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    run, arguments = gradients(equation, of_w, of_y)
    program = run.lower(*arguments).compile().as_text()
  products = [line for line in program.splitlines() if re.search(r"f32\[24,40\]\S* dot\(", line)]
  assert len(products) == 1
  assert "lhs_contracting_dims={1}, rhs_contracting_dims={0}" in products[0]


def transposed(equation, of_w):
  """Returns activations and a matrix as `Transposed`, sharded by the axes `of_w` of the matrix."""
  x, w, _ = arrays(equation)
  summed = x.ndim - 2
  w = np.moveaxis(w, range(summed), range(-summed, 0))
  return shard(x, *ROWS, *[None] * summed), Transposed(shard(w, *of_w[summed:], *of_w[:summed]))


@pytest.mark.parametrize(("equation", "of_w", "of_y"), PRODUCTS)
@pytest.mark.parametrize(("shape", "length"), [((1, 1, 1), 16), ((1, 1, 1), 2), ((2, 2, 2), 2)])
def test_a_transposed_matrix_gives_the_same_product(equation, of_w, of_y, shape, length):
  x, w, _ = arrays(equation, np.float64)
  with jax.set_mesh(mesh_of(*shape)):
    rows, stored = transposed(equation, of_w)
    run = jax.jit(lambda x, w: product(equation, x, Transposed(gathered(w.stored)), of_y))
    found = run(rows[:, :length], stored)
  np.testing.assert_allclose(found, np.einsum(equation, x[:, :length], w), atol=3e-5)


def test_few_rows_are_the_right_operand():
  """Products with the matrix on the right take up to 1.5 times as long."""
  equation, of_w, of_y = PRODUCTS[2]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    rows, stored = transposed(equation, of_w)
    run = jax.jit(lambda x, w: by_transposed(equation, x, w, of_y, "float32"))
    few, many = (run.lower(rows[:, :i], stored).compile().as_text() for i in (2, 16))
  assert 8 * 2 <= FEW_ROWS < 8 * 16
  assert "f32[40,16]{1,0} dot(" in few
  assert "f32[128,40]{1,0} dot(" in many
