import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.mesh import shard
from cm3leon_jax.training import loss
from tests.models.tiny import mesh_of

B, L, D, V = 4, 12, 16, 96


def plain_fp64(hidden, table, targets):
  logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
  top = logits.max(-1, keepdims=True)
  log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
  return log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  return rng.normal(size=(B, L, D)).astype("f4"), rng.normal(size=(V, D)).astype("f4"), rng.integers(0, V, (B, L)).astype("i4")


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_chunked_and_sharded_equals_plain_fp64(arrays, shape, chunk):
  with jax.set_mesh(mesh_of(*shape)):
    hidden, table, targets = arrays
    args = (
      shard(jnp.asarray(hidden), "batch", "length", "act"),
      shard(jnp.asarray(table), "vocab", None),
      shard(jnp.asarray(targets), "batch", "length"),
    )
    found = jax.jit(loss.chunked_nll, static_argnums=3)(*args, chunk)
  np.testing.assert_allclose(found, plain_fp64(hidden, table, targets), rtol=2e-6, atol=2e-6)
  wrong = plain_fp64(hidden, table, np.roll(targets, 1, 1))
  assert np.abs(np.asarray(found) - wrong).max() > 0.1


def test_gradient_of_chunks_equals_gradient_of_the_whole(arrays):
  hidden, table, targets = (jnp.asarray(x) for x in arrays)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    grad = lambda chunk: jax.grad(lambda h, t: loss.chunked_nll(h, t, targets, chunk).sum(), argnums=(0, 1))(hidden, table)
    for a, b in zip(grad(3), grad(L)):
      np.testing.assert_allclose(a, b, atol=2e-5)


def test_modality_losses_literal():
  nll = jnp.array([[1.0, 2.0, 3.0, 100.0]])
  targets = jnp.array([[5, 60, 61, 0]])
  weights = jnp.array([[1.0, 0.5, 1.0, 0.0]])
  with jax.set_mesh(mesh_of(1, 1, 1)):
    losses = loss.modality_losses(loss.modality_sums(nll, targets, weights, text_size=50))
  assert float(losses["loss"]) == pytest.approx((1 + 1 + 3) / 2.5)
  assert float(losses["image_loss"]) == pytest.approx((1 + 3) / 1.5)
  assert float(losses["text_loss"]) == pytest.approx(1)
