"""Computes edge maps of images. A model learns to draw an image from its edge map."""

# H height, W width.

import dataclasses
import types

import numpy as np

from cm3leon_jax import extras
from cm3leon_jax.errors import UserError

LOW, HIGH = 100, 200  # Hysteresis thresholds, as in most examples of ControlNet.


def load_opencv() -> types.ModuleType:
  """Imports OpenCV, which only tasks with computed maps need. Raises UserError if it is absent."""
  try:
    import cv2
  except ImportError as error:
    raise UserError(
      f"edge maps need OpenCV, which is not installed ({error}): {extras.install('demo')}."
    ) from error
  return cv2


def canny_edges(image: np.ndarray) -> np.ndarray:
  """Draws the edges that the method of Canny (1986) finds, in white and one pixel wide.

  Each pixel uses the color channel with the largest gradient. A yellow object on white therefore
  has edges, too. The background is black. The image and the result are [H, W, 3] uint8.
  """
  edges = load_opencv().Canny(np.ascontiguousarray(image), LOW, HIGH)
  return np.repeat(edges[..., None], 3, axis=2)


def scribble(image: np.ndarray) -> np.ndarray:
  """Draws an image like a person's scribble, with few lines that are thick and smooth.

  Blurs the image, finds its edges, and widens the edges to thick lines. Then blurs and thresholds
  the lines, which makes corners round. The line width grows with the height of the image. The lines
  are white on black. The image and the result are [H, W, 3] uint8.
  """
  cv2, width = load_opencv(), max(2, image.shape[0] // 64)
  blurred = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), width / 2)
  thick = cv2.dilate(canny_edges(blurred)[..., 0], np.ones((width, width), np.uint8))
  smooth = cv2.GaussianBlur(thick, (0, 0), width / 2)
  return np.repeat(np.where(smooth > 127, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


MAPS = {"canny": canny_edges, "scribble": scribble}


@dataclasses.dataclass(frozen=True)
class ImageMap:
  """A map of `image`, which is computed when it is read. `kind` is a key of MAPS."""

  kind: str
  image: "str | np.ndarray | ImageMap"
