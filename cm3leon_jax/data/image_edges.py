"""Computes the edges of an image, which a model is given to draw another image with these edges."""

# H height, W width.

import cv2
import numpy as np

LOW, HIGH = 100, 200  # Thresholds of hysteresis, as most examples of ControlNet have them.


def canny_edges(image: np.ndarray) -> np.ndarray:
  """Finds edges by the method of Canny (1986).

  In a pixel of several channels the one with the largest gradient counts, so that a yellow object
  on white has edges, too.

  Args:
    image: [H, W, 3] uint8.

  Returns:
    [H, W, 3] uint8: white edges of one pixel on black.
  """
  edges = cv2.Canny(np.ascontiguousarray(image), LOW, HIGH)
  return np.repeat(edges[..., None], 3, axis=2)
