"""Compares images with their reconstructions: background and drawing apart, in dB and in color."""

# H height, W width.

from jaxtyping import Float, UInt8
import numpy as np

NEAR = 8  # Levels per channel by which a pixel of the background may differ from its color.
# Lab from linear RGB: rows are X, Y, Z (IEC 61966-2-1), divided by those of white.
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
XYZ /= XYZ.sum(1, keepdims=True)


def compare(image: UInt8[np.ndarray, "H W 3"], made: UInt8[np.ndarray, "H W 3"]) -> list[float]:
  """Returns the PSNR in dB and the difference of mean colors of the worse part of an image.

  The parts are the background, whose color at least half of the border has, and the drawing on it.
  An image without a background, such as a photo, is one part. The PSNR of a whole drawing is mostly
  that of the paper, so a drawing in a wrong color would have 25 dB.

  The difference is the distance in CIE Lab (Delta E 1976) of the mean colors. In the drawing and
  in its reconstruction, pixels have the fourth power of their distance from the background as
  weight. So edges, which are half background, count little, and so do errors of the shape.
  """
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
  paper = np.median(border, axis=0)
  parts = [(np.ones(image.shape[:2], bool),) * 3]
  if 2 * (np.abs(border - paper).max(-1) <= NEAR).sum() >= len(border):
    away, made_away = (np.abs(x - paper).max(-1) / 255 for x in (image, made))
    inside = away <= NEAR / 255
    # If the drawing is lost, it has the color of the paper.
    parts = [(inside, inside, inside), (~inside, away**4, made_away**4 + 1e-9)]
  result = []
  for part, *weights in parts:
    if part.any():
      error = np.mean((image[part].astype(np.float64) - made[part]) ** 2) / 255**2
      # An exact reconstruction counts as an error of one level in one value.
      psnr = -10 * np.log10(max(error, 1 / (255**2 * image.size)))
      pixels = (x.reshape(-1, 3) for x in (image, made))
      colors = [lab(np.average(x, 0, w.ravel())) for x, w in zip(pixels, weights)]
      result.append((psnr, np.linalg.norm(colors[0] - colors[1])))
  return [float(min(psnr for psnr, _ in result)), float(max(color for _, color in result))]


def lab(color: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3"]:
  """Converts a color from sRGB, in [0, 255], to CIE Lab (white is D65, [100, 0, 0])."""
  values = color / 255
  linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
  ratios = XYZ @ linear
  x, y, z = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
