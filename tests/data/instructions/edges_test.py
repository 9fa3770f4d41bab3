import numpy as np
import pytest

from cm3leon_jax.data.instructions.edges import canny_edges, scribble


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
