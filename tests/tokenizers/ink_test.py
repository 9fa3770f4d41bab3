import jax.numpy as jnp
import numpy as np

from cm3leon_jax.scenes.config import COLORS
from cm3leon_jax.scenes.drawings import CELL, SIDE, render
from cm3leon_jax.scenes.world import Placed, Scene
from cm3leon_jax.tokenizers import ink, vqgan


def drawn(color):
  image = render(Scene((Placed("bell", color, "top left"),)))[None]
  return vqgan.to_float(jnp.asarray(image))


def test_ink_is_that_of_the_icon_in_every_color():
  inks = np.stack([np.asarray(ink.ink_of(drawn(color)))[0] for color in COLORS])
  assert inks.min() == -1
  assert inks.max() == 1
  np.testing.assert_allclose(inks, np.broadcast_to(inks[:1], inks.shape), atol=0.02)


def test_the_color_is_that_of_the_ink_even_where_it_is_mixed_with_white():
  for color, rgb in COLORS.items():
    x = drawn(color)
    found = np.asarray(ink.color_of(x, 6))[0]
    amount = (1 + np.asarray(ink.ink_of(x))[0, ..., 0]).reshape(8, 6, 8, 6).sum((1, 3)) / 2
    inked = amount > 3
    assert inked.sum() > 8
    colors = (found[inked][:, :3] + 1) / 2 * 255
    np.testing.assert_allclose(colors, np.broadcast_to(rgb, colors.shape), atol=8)
    # A square without ink is black.
    np.testing.assert_array_equal(found[amount == 0][:, :3], -1)
    np.testing.assert_array_equal(found[..., 3], 1)
  assert SIDE == 2 * CELL == 48
