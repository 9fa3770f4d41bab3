import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.tokenizers import ink, vqgan
from examples.scenes.drawings import CELL, SIDE, render
from examples.scenes.options import COLORS
from examples.scenes.world import Placed, Scene

ink_of, color_of = jax.jit(ink.ink_of), jax.jit(ink.color_of, static_argnums=1)


def drawn(color):
  image = render(Scene((Placed("bell", color, "top left"),)))[None]
  return vqgan.to_float(jnp.asarray(image))


def test_ink_is_that_of_the_icon_in_every_color():
  inks = np.stack([np.asarray(ink_of(drawn(color)))[0] for color in COLORS])
  assert inks.min() == -1
  assert inks.max() == 1
  np.testing.assert_allclose(inks, np.broadcast_to(inks[:1], inks.shape), atol=0.02)


def test_the_color_is_that_of_the_ink_even_where_it_is_mixed_with_white():
  for color, rgb in COLORS.items():
    x = drawn(color)
    found = np.asarray(color_of(x, 6))[0]
    amount = (1 + np.asarray(ink_of(x))[0, ..., 0]).reshape(8, 6, 8, 6).sum((1, 3)) / 2
    inked = amount > 3
    assert inked.sum() > 8
    colors = (found[inked][:, :3] + 1) / 2 * 255
    np.testing.assert_allclose(colors, np.broadcast_to(rgb, colors.shape), atol=8)
    # A square without ink is black.
    np.testing.assert_array_equal(found[amount == 0][:, :3], -1)
    np.testing.assert_array_equal(found[..., 3], 1)
  assert SIDE == 2 * CELL == 48


def directions_of(colors):
  squares = np.array([COLORS[color] for color in colors], np.uint8)
  squares = squares[:, None, None].repeat(6, 1).repeat(6, 2)
  found = np.asarray(color_of(vqgan.to_float(jnp.asarray(squares)), 6))[:, 0, 0]
  return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_the_common_colors_are_those_of_the_drawings():
  pixels = np.concatenate([np.asarray(drawn(color)) for color in COLORS])
  found = ink.common_colors(pixels, 6, len(COLORS), 0)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
  expected = directions_of(COLORS)
  best = (expected @ found.T).argmax(1)
  assert sorted(best) == list(range(len(COLORS)))  # Each color has its own center.
  np.testing.assert_allclose(found[best], expected, atol=0.05)
  # Negative control: at random, two colors share a center.
  random = np.random.default_rng(0).normal(size=expected.shape)
  assert len(set((expected @ random.T).argmax(1))) < len(COLORS)
