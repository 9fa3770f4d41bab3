import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.mesh import spec
from cm3leon_jax.training.step import loss
from tests.models.tiny import mesh_of, place

B, L, D, V = 8, 12, 16, 96


def plain_fp64(hidden, table, targets):
  logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
  top = logits.max(-1, keepdims=True)
  log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
  return log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  hidden, table = (rng.normal(size=size).astype("f4") for size in ((B, L, D), (V, D)))
  return hidden, table, rng.integers(0, V, (B, L)).astype("i4"), rng.random((B, L)).astype("f4")


def split(hidden, table, targets, weights):
  """Shards the arrays over the current mesh as in training."""
  return (
    place(hidden, "batch", "length", "act"),
    place(table, "vocab_stored", None),
    place(targets, "batch", "length"),
    place(weights, "batch", "length"),
  )


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 2, 2)])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_chunked_and_sharded_equals_plain_fp64(arrays, shape, chunk):
  hidden, table, targets, weights = arrays
  with jax.set_mesh(mesh_of(*shape)):
    total, found = jax.jit(loss.weighted_nll, static_argnums=4)(*split(*arrays), chunk)
  expected = plain_fp64(hidden, table, targets)
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
  assert float(total) == pytest.approx((weights * expected).sum(), rel=1e-5)
  wrong = plain_fp64(hidden, table, np.roll(targets, 1, 1))
  assert np.abs(np.asarray(found) - wrong).max() > 0.1


def test_large_logits_and_z_loss(arrays):
  """Logits of up to 900 must not overflow in fp32. z_loss adds z_loss x log(Z)^2 per target."""
  hidden, table, targets, weights = arrays
  hidden = 50 * hidden
  with jax.set_mesh(mesh_of(1, 2, 2)):
    on_mesh = split(hidden, table, targets, weights)
    total, found = jax.jit(loss.weighted_nll, static_argnums=(4, 5))(*on_mesh, 4, 0.1)
  expected = plain_fp64(hidden, table, targets)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
  hit = np.einsum("bld,bld->bl", hidden.astype("f8"), table.astype("f8")[targets])
  assert np.abs(hit).max() > 500
  log_z = expected + hit
  assert float(total) == pytest.approx((weights * (expected + 0.1 * log_z**2)).sum(), rel=1e-5)


def autodiff_loss(hidden, table, targets, weights, z_loss):
  """Computes the same loss from all logits, with gradients by JAX."""
  logits = hidden @ table.T
  log_z = jax.nn.logsumexp(logits, -1)
  nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return jnp.sum(weights * (nll + z_loss * log_z**2))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2, 2)])
def test_the_hand_written_gradient_equals_autodiff_of_the_full_logits(arrays, shape):
  z_loss = 0.1
  gradient = jax.jit(jax.grad(autodiff_loss, argnums=(0, 1)))
  expected = gradient(*map(jnp.asarray, arrays), z_loss)
  with jax.set_mesh(mesh_of(*shape)):

    def value(h, t, *rest):
      return 3.0 * loss.weighted_nll(h, t, *rest, 4, z_loss)[0]

    found = jax.jit(jax.grad(value, argnums=(0, 1)))(*split(*arrays))
    assert found[1].sharding.spec == spec("vocab_stored", None)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, 3 * b, atol=3e-5)
  other = gradient(*map(jnp.asarray, arrays), z_loss + 0.1)
  assert np.abs(np.asarray(found[0]) - 3 * np.asarray(other[0])).max() > 1e-3


def test_modality_losses_literal():
  nll, weights = np.float32([[1, 2, 3, 100]]), np.float32([[1, 0.5, 1, 0]])
  targets = np.int32([[49, 50, 61, 0]])

  @jax.jit
  def of_modalities(*arrays):
    return loss.modality_losses(loss.modality_sums(*arrays, text_size=50))

  with jax.set_mesh(mesh_of(1, 1, 1)):
    losses = of_modalities(nll, targets, weights)
  assert float(losses["loss"]) == pytest.approx((1 + 1 + 3) / 2.5)
  assert float(losses["image_loss"]) == pytest.approx((1 + 3) / 1.5)
  assert float(losses["text_loss"]) == pytest.approx(1)
