"""Splits drawings on white into ink and its color, for the quantizer `shape_color`."""

# B batch, H height, W width, h = H / side, w = W / side.

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from cm3leon_jax.tokenizers.config import COLOR_DIM

Pixels = Float[Array | np.ndarray, "B H W 3"]


def ink_of(x: Pixels) -> Float[Array, "B H W 1"]:
  """Computes how much ink each pixel in [-1, 1] has: from -1, white, to 1.

  The ink is the distance of the darkest channel from white. Pure colors and black have full ink,
  and a pixel at an edge, which is a mixture with white, has the share of its ink.
  """
  return -x.min(-1, keepdims=True)


def color_of(x: Pixels, side: int) -> Float[Array, "B h w 4"]:
  """Computes the color of the ink of each square of `side` x `side` pixels in [-1, 1].

  The color is that of the pixels without the white that is mixed in, weighted by their ink. A
  square without ink is black. The last channel is 1, so that colors differ in their directions.
  """
  b, height, width, _ = x.shape
  ink = (1 + ink_of(x)) / 2
  colored = jnp.concatenate([ink - (1 - x) / 2, ink], -1)
  squares = colored.reshape(b, height // side, side, width // side, side, COLOR_DIM).sum((2, 4))
  colors = 2 * squares[..., :3] / (squares[..., 3:] + 0.05) - 1
  return jnp.concatenate([colors, jnp.ones_like(squares[..., 3:])], -1)
