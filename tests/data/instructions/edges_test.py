import numpy as np
import pytest

from cm3leon_jax.data.instructions.edges import canny_edges, scribble
from cm3leon_jax.scenes.config import COLORS
from cm3leon_jax.scenes.drawings import render
from cm3leon_jax.scenes.world import Placed, Scene


def test_edges_of_a_square_are_its_border():
  image = np.full((20, 30, 3), 255, np.uint8)
  image[5:15, 8:20] = (0, 0, 255)
  edges = canny_edges(image)
  assert (edges.shape, edges.dtype) == (image.shape, np.uint8)
  assert set(np.unique(edges)) == {0, 255}
  rows, columns = np.nonzero(edges[..., 0])
  assert min(rows) in (4, 5)
  assert max(rows) in (14, 15)
  assert min(columns) in (7, 8)
  assert max(columns) in (19, 20)
  assert not edges[7:13, 10:18].any()


def test_objects_of_every_color_have_edges_and_white_has_none():
  for color in COLORS:
    edges = canny_edges(render(Scene((Placed("star", color, "top left"),))))
    assert 30 < (edges[..., 0] > 0).sum() < 24 * 24 / 3
    assert not edges[26:].any()
  assert not canny_edges(np.full((48, 48, 3), 255, np.uint8)).any()


def square(side):
  image = np.full((side, side, 3), 255, np.uint8)
  image[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = (0, 0, 255)
  return image


@pytest.mark.parametrize("side", [64, 128, 256])
def test_a_scribble_is_a_thick_outline(side):
  image = square(side)
  drawn, edges = scribble(image)[..., 0], canny_edges(image)[..., 0]
  assert (scribble(image).shape, drawn.dtype) == (image.shape, np.uint8)
  assert set(np.unique(drawn)) == {0, 255}
  width = max(2, side // 64)
  assert (drawn > 0).sum() > 1.5 * (edges > 0).sum()
  # Every line is near an edge. The center and the border of the image have no lines.
  rows, columns = np.nonzero(edges)
  lines = np.argwhere(drawn > 0)
  distances = np.abs(lines[:, None] - np.stack([rows, columns], 1)[None]).max(-1).min(1)
  assert distances.max() <= 2 * width
  assert not drawn[side // 2 - 4 : side // 2 + 4, side // 2 - 4 : side // 2 + 4].any()
  assert not drawn[: side // 8].any()
  assert (drawn[side // 2] > 0).sum() == 2 * width  # The middle row crosses two lines.


def test_a_scribble_leaves_out_details():
  """Noise adds edges everywhere, but the scribbles with and without noise are almost equal."""
  noise = np.random.default_rng(0).integers(-90, 90, (256, 256, 3))
  noisy = np.clip(square(256).astype(int) + noise, 0, 255).astype(np.uint8)
  clean, drawn = scribble(square(256)), scribble(noisy)
  union = np.logical_or(clean > 0, drawn > 0).sum()
  assert np.logical_and(clean > 0, drawn > 0).sum() / union > 0.6
  assert not scribble(np.full((48, 48, 3), 255, np.uint8)).any()
