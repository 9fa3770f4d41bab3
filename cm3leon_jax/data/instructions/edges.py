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
  """Finds edges by the method of Canny (1986): white, one pixel wide, on black.

  Each pixel uses the channel with the largest gradient, so that a yellow object on white has edges,
  too. The image and the result are [H, W, 3] uint8.
  """
  edges = load_opencv().Canny(np.ascontiguousarray(image), LOW, HIGH)
  return np.repeat(edges[..., None], 3, axis=2)


def scribble(image: np.ndarray) -> np.ndarray:
  """Draws an image as a person would scribble it, with few thick smooth lines.

  Blurs the image, finds edges and thickens them. Then blurs the lines and thresholds them, so that
  corners are round. The line width grows with the height of the image. The lines are white on
  black. The image and the result are [H, W, 3] uint8.
  """
  cv2, width = load_opencv(), max(2, image.shape[0] // 64)
  blurred = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), width / 2)
  thick = cv2.dilate(canny_edges(blurred)[..., 0], np.ones((width, width), np.uint8))
  smooth = cv2.GaussianBlur(thick, (0, 0), width / 2)
  return np.repeat(np.where(smooth > 127, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


MAPS = {"canny": canny_edges, "scribble": scribble}


@dataclasses.dataclass(frozen=True)
class ImageMap:
  """A map that is computed when the image is read. `kind` is a key of MAPS."""

  kind: str
  image: "str | np.ndarray | ImageMap"
