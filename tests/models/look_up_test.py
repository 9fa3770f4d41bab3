"""Tests that tables are read correctly, and gradients summed in fp32, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.mesh import gathered, spec
from cm3leon_jax.models.transformer import look_up
from tests.models.tiny import mesh_of, place

B, L, D, V = 8, 128, 16, 96
COMMON = 7  # This id occurs 770 times.


@pytest.fixture(scope="module")
def arrays():
  """Returns a table [V, D], gradients of rows [B, L, D], both exact in bfloat16, and ids [B, L]."""
  rng = np.random.default_rng(0)
  ids = rng.integers(0, V, (B, L)).astype(np.int32)
  ids[ids == COMMON] = COMMON + 1
  ids.flat[rng.permutation(B * L)[:770]] = COMMON
  table, by_rows = rng.normal(size=(V, D)), rng.normal(0.5, 1.0, (B, L, D))
  return *(np.asarray(jnp.bfloat16(x), np.float32) for x in (table, by_rows)), ids


def gradient(arrays, shape, axes, function):
  """Looks up rows on a mesh, with a table sharded over `axes`; returns rows and table gradient."""
  table, by_rows, ids = arrays
  with jax.set_mesh(mesh_of(*shape)):

    def pulled(table, ids, by_rows):
      rows, pull = jax.vjp(lambda t: function(t, ids), table)
      return rows, pull(by_rows.astype(rows.dtype))[0]

    rows, found = jax.jit(pulled)(
      place(table, *axes),
      place(ids, "batch", "length"),
      place(by_rows, "batch", "length", "act"),
    )
    assert found.sharding.spec == spec(*axes)
  return np.asarray(rows, np.float64), np.asarray(found, np.float64)


def summed(arrays):
  """Computes the gradient of the table in fp64."""
  _, by_rows, ids = arrays
  result = np.zeros((V, D))
  np.add.at(result, ids, by_rows.astype(np.float64))
  return result


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize("axes", [("vocab_stored", None), (None, "embed")])
def test_the_gradient_of_a_bfloat16_look_up_is_the_fp64_sum(arrays, shape, axes):
  rows, found = gradient(arrays, shape, axes, lambda t, ids: look_up(t, ids, "bfloat16"))
  np.testing.assert_array_equal(rows, arrays[0][arrays[2]])
  np.testing.assert_allclose(found, summed(arrays), rtol=1e-6, atol=1e-5)


def test_a_sum_in_bfloat16_would_be_found(arrays):
  """Negative control: JAX's own gradient of reading a bfloat16 table has a large error."""

  def plain(table, ids):
    table = gathered(table.astype(jnp.bfloat16))
    return table.at[ids].get(out_sharding=spec("batch", "length", "act"))

  _, found = gradient(arrays, (1, 1, 1, 1), ("vocab_stored", None), plain)
  expected = summed(arrays)
  error = np.linalg.norm(found - expected, axis=1)
  size = np.linalg.norm(expected, axis=1)
  assert error[COMMON] > 0.02 * size[COMMON]
  rare = np.arange(V) != COMMON
  assert (error[rare] <= 0.01 * size[rare]).all()
