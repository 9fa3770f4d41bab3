"""Splits drawings on white into ink and its color, for the quantizer `shape_color`."""

# B batch, H height, W width, h = H / side, w = W / side.

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from scipy.cluster import vq

from cm3leon_jax.config.tokenizers import COLOR_DIM

MIN_INK = 0.1  # Mean ink of a square, from 0 to 1, below which its color is mostly noise.
Pixels = Float[Array | np.ndarray, "B H W 3"]


def ink_of(x: Pixels) -> Float[Array, "B H W 1"]:
  """Computes how much ink each pixel in [-1, 1] has: from -1, white, to 1.

  The ink is the distance of the darkest channel from white. Pure colors and black have full ink,
  and a pixel at an edge, half covered by ink, has half of the ink.
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


def common_colors(x: Pixels, side: int, count: int, seed: int) -> Float[np.ndarray, "count 4"]:
  """Finds the most common colors of ink in pixels in [-1, 1]: the centers of k-means.

  Squares with less mean ink than `MIN_INK` are ignored. If the entries of a codebook start at
  random, two real colors often end at the same entry, because another entry stays at black. If
  the squares have fewer colors than `count`, the others are random.
  """
  rng = np.random.default_rng(seed)
  x = jnp.asarray(x)
  colors = _directions(np.asarray(color_of(x, side)).reshape(-1, COLOR_DIM))
  ink = (1 + np.asarray(ink_of(x))) / 2
  shape = (len(x), x.shape[1] // side, side, x.shape[2] // side, side)
  inked = colors[ink.reshape(shape).mean((2, 4)).ravel() >= MIN_INK]
  distinct, found = np.unique(inked.round(3), axis=0), rng.normal(size=(count, COLOR_DIM))
  if len(distinct) > count:
    found, _ = vq.kmeans2(inked, count, minit="++", seed=rng)
  else:
    found[: len(distinct)] = distinct
  return _directions(found).astype(np.float32)


def _directions(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
