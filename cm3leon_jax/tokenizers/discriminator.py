"""Defines the patch discriminator of the image tokenizer, its loss, and its adaptive weight."""

# B batch, H height, W width, h height and w width of the grid of patch scores.

from collections.abc import Callable
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key, PyTree

from cm3leon_jax.config.tokenizers import VQGANConfig
from cm3leon_jax.models import nnx_params
from cm3leon_jax.tokenizers import vqgan
from cm3leon_jax.tokenizers.vqgan import Pixels

MAX_ADAPTIVE = 1e4  # Largest ratio of the two norms (Esser et al. 2021, published code).


class Discriminator(nnx.Module):
  """Scores patches (Isola et al. 2017): pixels [B, H, W, 3] -> [B, h, w], positive if real."""

  def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
    widths = [config.discriminator_width * 2**i for i in range(config.discriminator_layers)]
    self.layers = nnx.List(
      vqgan.conv(a, b, 4, rngs, stride=2) for a, b in zip([3, *widths], widths)
    )
    self.conv_out = vqgan.conv(widths[-1], 1, 3, rngs)

  def __call__(self, x: Pixels) -> Float[Array, "B h w"]:
    for i, layer in enumerate(self.layers):
      x = layer(x)
      x = nnx.leaky_relu(vqgan.normalize(x) if i else x, 0.2)
    return self.conv_out(x)[..., 0]


@functools.cache
def _structure(config: VQGANConfig) -> tuple[nnx.GraphDef, nnx.State]:
  return nnx_params.structure(lambda: Discriminator(config, nnx.Rngs(params=0)))


def init_params(config: VQGANConfig, key: Key[Array, ""]) -> dict:
  """Initializes fp32 parameters as a pure dict."""
  return nnx_params.random(_structure(config)[1], key)


def scores(config: VQGANConfig, params: dict, x: Pixels) -> Float[Array, "B h w"]:
  """Applies the discriminator: pixels [B, H, W, 3] -> scores [B, h, w]."""
  return nnx_params.fill(*_structure(config), params)(x)


def hinge_loss(params: dict, config: VQGANConfig, x: Pixels, y: Pixels) -> Float32[Array, ""]:
  """Computes the hinge loss of scores for images x and reconstructions y, [B, H, W, 3].

  Scores of x above 1, and scores of y below -1, do not contribute.
  """
  return jnp.mean(nnx.relu(1 - scores(config, params, x))) + jnp.mean(
    nnx.relu(1 + scores(config, params, y))
  )


def adaptive_weight(
  last_layer: Callable[[PyTree], Array],
  params: PyTree,
  y: Pixels,
  reconstruction_loss: Callable[[Array], Array],
  adversarial_loss: Callable[[Array], Array],
) -> Float32[Array, ""]:
  """Computes the reconstruction gradient's norm divided by the adversarial gradient's norm.

  Both gradients are taken at the decoder's last layer (Esser et al. 2021, arXiv 2012.09841,
  equation 7). `last_layer` maps `params` to `y`, pixels [B, H, W, 3]. The losses map pixels to
  scalars. Returns an fp32 scalar from 0 to `MAX_ADAPTIVE`, without gradient.
  """
  params, y = jax.lax.stop_gradient((params, y))
  _, pull = jax.vjp(last_layer, params)

  def norm(loss: Callable[[Array], Array]) -> Float32[Array, ""]:
    (grads,) = pull(jax.grad(loss)(y))
    return jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))

  ratio = norm(reconstruction_loss) / (norm(adversarial_loss) + 1e-4)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0, MAX_ADAPTIVE))
