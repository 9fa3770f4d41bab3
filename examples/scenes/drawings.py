"""Renders scenes with Material Design Icons 7 (Apache-2.0, Pictogrammers), an icon font."""

import functools
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from cm3leon_jax import extras
from cm3leon_jax.errors import UserError
from examples.scenes.options import COLORS, Style
from examples.scenes.world import ICONS, PLACES, Placed, Scene

# H height, W width of an image.

CELL = 24  # Side length of a place, in pixels. The icons are designed for this size.
SIDE = 2 * CELL


@functools.cache
def _font() -> tuple[Any, ImageFont.FreeTypeFont]:
  """Loads the icon font and its glyphs, by name, on first use: some commands need neither."""
  try:
    from fonticon_mdi7 import MDI7
  except ImportError as error:
    raise UserError(
      f"the icons of `scenes` are not installed ({error}): {extras.install('demo')}."
    ) from error
  return MDI7, ImageFont.truetype(str(MDI7.__font_file__), CELL)


@functools.cache
def alpha(icon: str) -> np.ndarray:
  """Renders the ink of an icon: [CELL, CELL] uint8, where 255 is full ink.

  `icon` is its name in Material Design Icons 7.
  """
  glyphs, font = _font()
  glyph = getattr(glyphs, icon).rpartition(".")[2]
  image = Image.new("L", (CELL, CELL))
  middle = (CELL / 2, CELL / 2)
  ImageDraw.Draw(image).text(middle, glyph, font=font, fill=255, anchor="mm")
  ink = np.array(image)
  ink.flags.writeable = False  # The array is cached, so callers must not change it.
  return ink


@functools.cache
def ink(icon: str, style: Style = "filled") -> np.ndarray:
  """Renders the ink of an icon in a style: [CELL, CELL] uint8, where 255 is full ink.

  The style "outlined" subtracts from each pixel the minimum of the pixel and its four neighbors:

    filled = [[0 0 0 0 0], [0 255 255 255 0], [0 255 255 255 0], [0 255 255 255 0], [0 0 0 0 0]]
    outlined = [[0 0 0 0 0], [0 255 255 255 0], [0 255 0 255 0], [0 255 255 255 0], [0 0 0 0 0]]
  """
  filled = alpha(icon)
  if style == "filled":
    return filled
  edges = outline(filled)
  edges.flags.writeable = False  # The array is cached, so callers must not change it.
  return edges


def outline(filled: np.ndarray) -> np.ndarray:
  """Keeps only the edges of ink, [H, W] uint8 (see `ink`). Outside the array, there is no ink."""
  cross = ndimage.generate_binary_structure(2, 1)
  return filled - ndimage.grey_erosion(filled, footprint=cross, mode="constant", cval=0)


def corner(place: str) -> tuple[int, int]:
  """Returns the left and the top coordinate of a place, in pixels."""
  row, column = divmod(PLACES.index(place), 2)
  return column * CELL, row * CELL


def render(scene: Scene, style: Style = "filled") -> np.ndarray:
  """Renders a scene on a white background: [H, W, 3] uint8 with H = W = SIDE."""
  image = np.full((SIDE, SIDE, 3), 255, np.uint8)
  for placed in scene.objects:
    left, top = corner(placed.place)
    cell = _colored(ICONS[placed.object], placed.color, style)
    image[top : top + CELL, left : left + CELL] = cell
  return image


@functools.lru_cache(20_000)
def _colored(icon: str, color: str, style: Style) -> np.ndarray:
  """Renders an icon in one color on a white background: [CELL, CELL, 3] uint8."""
  weight = ink(icon, style).astype(np.float32)[..., None] / 255
  pixels = 255 * (1 - weight) + np.array(COLORS[color], np.float32) * weight
  return np.rint(pixels).astype(np.uint8)


def box(placed: Placed) -> list[int]:
  """Returns the box of an object's ink. It is the same in all styles.

  The box is [left, top, right, bottom] in pixels. Right and bottom are exclusive.
  """
  left, top = corner(placed.place)
  bounds = Image.fromarray(alpha(ICONS[placed.object])).getbbox()
  assert bounds is not None
  x0, y0, x1, y1 = bounds
  return [left + x0, top + y0, left + x1, top + y1]
