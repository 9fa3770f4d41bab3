"""Computes the image tokenizer's losses of pixels, means, edges, features and a discriminator."""

# B batch, H height, W width, C channels, E code width, h height and w width of the code grid.

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PyTree

from cm3leon_jax.config.tokenizers import VQGANConfig
from cm3leon_jax.tokenizers import discriminator as discriminator_lib
from cm3leon_jax.tokenizers import perceptual, quantizers, vqgan
from cm3leon_jax.tokenizers.vqgan import Channels, Pixels

SCALES = 3  # Number of scales of `multiscale_loss`: squares of 2, 4 and 8 pixels.


class Outputs(NamedTuple):
  """Further results of `generator_loss`.

  Attributes:
    reconstruction: [B, H, W, 3].
    encodings: [B, h, w, E].
    indices: int32 [B, h, w].
    adaptive: factor by which the adversarial weight was multiplied; 1 if it is not adaptive.
  """

  reconstruction: jax.Array
  encodings: jax.Array
  indices: jax.Array
  adaptive: jax.Array


def multiscale_loss(x: Channels, y: Channels) -> Float32[Array, ""] | float:
  """Computes the mean absolute error of means over squares with sides of 2, 4 and 8 pixels.

  Skips a scale if the image cannot be divided into squares of this size.
  """
  error, losses = y - x, []
  for _ in range(SCALES):
    if error.shape[1] % 2 or error.shape[2] % 2:
      break
    b, h, w, c = error.shape
    error = error.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    losses.append(jnp.mean(jnp.abs(error)))
  return sum(losses) / max(len(losses), 1)


def gradient_loss(x: Channels, y: Channels) -> Float32[Array, ""]:
  """Computes the mean absolute error of differences of adjacent pixels, in both directions."""
  error = y - x
  return (
    jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
  ) / 2


def reconstruction_loss(
  config: VQGANConfig, x: Pixels, y: Pixels, features: dict | None = None
) -> Float32[Array, ""]:
  """Computes the weighted sum of all losses that compare images x with reconstructions y.

  Pixels are in [-1, 1]. `features`, the result of `perceptual.make_params`, is required if
  `perceptual_weight` is positive.
  """
  loss = config.l2_weight * jnp.mean((y - x) ** 2) + config.l1_weight * jnp.mean(jnp.abs(y - x))
  if config.multiscale_weight:
    loss += config.multiscale_weight * multiscale_loss(x, y)
  if config.gradient_weight:
    loss += config.gradient_weight * gradient_loss(x, y)
  if config.perceptual_weight:
    assert features is not None
    loss += config.perceptual_weight * jnp.mean(perceptual.distance(features, x, y))
  return loss


def generator_loss(
  params: dict,
  discriminator: dict | None,
  config: VQGANConfig,
  num_codes: int,
  x: Pixels,
  features: dict | None = None,
) -> tuple[Float32[Array, ""], Outputs]:
  """Computes the loss of the VQGAN: reconstruction, codebook and commitment loss.

  With a discriminator, adds the negative mean score of the reconstructions. The pixels of `x` are
  in [-1, 1]. For `features`, see `reconstruction_loss`.
  """
  hidden, z, q, indices = vqgan.bind(config, num_codes, params).hidden(x)

  def last_layer(layer: PyTree) -> Float[Array, "B H W 3"]:
    decoder = {**params["decoder"], "conv_out": layer}
    return vqgan.bind(config, num_codes, {**params, "decoder": decoder}).decoder.last(hidden)

  def rebuilt(y: Pixels) -> Float32[Array, ""]:
    return reconstruction_loss(config, x, y, features)

  y = last_layer(params["decoder"]["conv_out"])
  loss, adaptive = rebuilt(y), jnp.ones(())
  loss += quantizers.loss(config.quantizer, config.codebook_weight, config.commitment_weight, z, q)
  if discriminator is not None:

    def not_convincing(y: Pixels) -> Float32[Array, ""]:
      return -discriminator_lib.scores(config, discriminator, y).mean()

    if config.adversarial_adaptive:
      layer = params["decoder"]["conv_out"]
      adaptive = discriminator_lib.adaptive_weight(last_layer, layer, y, rebuilt, not_convincing)
    loss += config.adversarial_weight * adaptive * not_convincing(y)
  return loss, Outputs(y, z, indices, adaptive)
