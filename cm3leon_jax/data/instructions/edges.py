"""Computes edge maps of an image. A model draws images from such maps."""

# H height, W width.

import dataclasses
import types

import numpy as np

from cm3leon_jax import extras
from cm3leon_jax.config import UserError

LOW, HIGH = 100, 200  # Hysteresis thresholds, as in most examples of ControlNet.


def load_opencv() -> types.ModuleType:
  """Imports OpenCV, which is an extra, because only tasks with computed maps need it.

  Raises:
    UserError: OpenCV is not installed.
  """
  try:
    import cv2
  except ImportError as error:
    raise UserError(
      f"edge maps need OpenCV, which is not installed ({error}): {extras.install('demo')}."
    ) from error
  return cv2


def canny_edges(image: np.ndarray) -> np.ndarray:
  """Finds edges by the method of Canny (1986).

  Each pixel uses the channel with the largest gradient, so that a yellow object on white has edges,
  too.

  Args:
    image: [H, W, 3] uint8.

  Returns:
    [H, W, 3] uint8: white edges, one pixel wide, on black.
  """
  edges = load_opencv().Canny(np.ascontiguousarray(image), LOW, HIGH)
  return np.repeat(edges[..., None], 3, axis=2)


def scribble(image: np.ndarray) -> np.ndarray:
  """Draws an image as a person would scribble it, with few thick smooth lines.

  Blurs the image, finds edges and thickens them. Then blurs the lines and thresholds them, so that
  corners are round. The line width grows with the height of the image.

  Args:
    image: [H, W, 3] uint8.

  Returns:
    [H, W, 3] uint8: white lines on black.
  """
  cv2, width = load_opencv(), max(2, image.shape[0] // 64)
  blurred = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), width / 2)
  thick = cv2.dilate(canny_edges(blurred)[..., 0], np.ones((width, width), np.uint8))
  smooth = cv2.GaussianBlur(thick, (0, 0), width / 2)
  return np.repeat(np.where(smooth > 127, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


MAPS = {"canny": canny_edges, "scribble": scribble}


@dataclasses.dataclass(frozen=True)
class ImageMap:
  """A map that is computed when the image is read.

  Attributes:
    kind: a key of MAPS.
    image: image that the map is computed from: a path, [H, W, 3] uint8, or another map.
  """

  kind: str
  image: "str | np.ndarray | ImageMap"
