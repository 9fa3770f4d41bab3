"""Tests edges of images."""

import numpy as np

from cm3leon_jax.data.image_edges import canny_edges
from cm3leon_jax.data.scene_drawings import render
from cm3leon_jax.data.scene_world import COLORS, Placed, Scene


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
