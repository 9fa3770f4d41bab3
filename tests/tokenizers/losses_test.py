import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.tokenizers import discriminator, losses, vqgan
from cm3leon_jax.training.image_models import vqgan_training
from tests.tokenizers.tiny import random_images, tiny_config

ADVERSARY = {"adversarial_weight": 0.8, "adversarial_adaptive": True, "adversarial_start": 0.5}
CONFIG = tiny_config(steps=12, discriminator_width=4, discriminator_layers=2, **ADVERSARY)
NUM_CODES = 16


@pytest.fixture(scope="module")
def images():
  return random_images()


def test_multiscale_loss_literals():
  """At coarser scales, a checkerboard of -1 and 1 has no error, and a constant error stays."""
  loss, x = jax.jit(losses.multiscale_loss), np.zeros((1, 8, 8, 1), np.float32)
  checkerboard = np.float32(np.indices((8, 8)).sum(0) % 2 * 2 - 1)[None, :, :, None]
  assert float(loss(x, checkerboard)) == 0
  assert float(loss(x, x + 0.5)) == pytest.approx(0.5)
  stripes = np.float32([1, -1, 1, -1]).repeat(2).reshape(1, 8, 1, 1)
  # The stripes differ at 1 of 3 scales.
  assert float(loss(x, x + stripes)) == pytest.approx(1 / 3)
  odd = np.ones((1, 6, 6, 1), np.float32)
  # The second scale, 3 x 3, cannot be halved.
  assert float(loss(0 * odd, odd)) == pytest.approx(1)


def test_gradient_loss_literals():
  """A constant error has loss 0; an error that grows by 2 per row has loss (2 + 0) / 2."""
  loss, x = jax.jit(losses.gradient_loss), np.zeros((1, 8, 8, 3), np.float32)
  assert float(loss(x, x + 0.7)) == 0
  ramp = 2 * np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
  assert float(loss(x, x + ramp)) == pytest.approx(1)


def test_weights_of_the_pixel_losses_count(images):
  x = vqgan.to_float(images)
  y = 0.5 * x[::-1]
  config = dataclasses.replace(CONFIG, multiscale_weight=2.0, gradient_weight=3.0)
  plain = losses.reconstruction_loss(CONFIG, x, y)
  expected = plain + 2 * losses.multiscale_loss(x, y) + 3 * losses.gradient_loss(x, y)
  np.testing.assert_allclose(losses.reconstruction_loss(config, x, y), expected, rtol=1e-6)
  assert expected > 1.1 * plain


def test_the_adaptive_weight_is_the_ratio_of_the_last_layers_gradients(images):
  """Compares with jax.grad of the whole losses, and with the maximum of 1e4."""
  params = vqgan_training.init_state(CONFIG, NUM_CODES, 0)["params"]
  network, x = (
    vqgan_training.init_state(CONFIG, NUM_CODES, 0)["discriminator"],
    vqgan.to_float(images),
  )

  def gradient(loss):
    grads = jax.jit(jax.grad(lambda p: loss(vqgan.bind(CONFIG, NUM_CODES, p)(x)[0])))(params)
    leaves = jax.tree.leaves(grads["decoder"]["conv_out"])
    return np.sqrt(sum(np.square(np.float64(g)).sum() for g in leaves))

  rebuilt = gradient(lambda y: losses.reconstruction_loss(CONFIG, x, y))
  convincing = gradient(lambda y: -discriminator.scores(CONFIG, network, y).mean())
  assert abs(rebuilt / convincing - 1) > 0.2

  @functools.partial(jax.jit, static_argnums=0)
  def adaptive(config, network):
    return losses.generator_loss(params, network, config, NUM_CODES, x)[1].adaptive

  found = adaptive(CONFIG, network)
  np.testing.assert_allclose(found, rebuilt / (convincing + 1e-4), rtol=1e-4)
  deaf = jax.tree.map(jnp.zeros_like, network)  # A discriminator whose gradient is 0.
  np.testing.assert_allclose(adaptive(CONFIG, deaf), min(1e4, rebuilt / 1e-4), rtol=1e-4)
  assert adaptive(dataclasses.replace(CONFIG, adversarial_adaptive=False), network) == 1


def test_the_discriminator_starts_late():
  assert vqgan_training.adversarial_from(CONFIG) == 6
  assert vqgan_training.adversarial_from(dataclasses.replace(CONFIG, adversarial_start=0.0)) == 0
