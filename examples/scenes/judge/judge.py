"""Judges images of the source `scenes`: finds the objects and checks the facts of a caption.

An image has four places. The pixels of a place are a cell. For a cell with ink, the judge finds the
palette color that fits the ink best, and the object of the world whose silhouette correlates best
with the ink. Ink without a clear color or shape is an unknown object, which makes an image wrong.
`benchmarks/evidence/scene_judge.py` prints the error rates, by which the thresholds were chosen.
"""

# B images, N cells, C colors, M silhouettes, S shifts, P pixels of a cell.

from collections.abc import Sequence
import functools
import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from examples.scenes import drawings, world
from examples.scenes.drawings import CELL, SIDE
from examples.scenes.judge.facts import UNKNOWN, Found, SceneVerdict, check
from examples.scenes.options import COLORS, Style

# Smallest correlation at which an object is known. With blur, blotches and color errors (PSNR
# 16 dB), 99% of objects still have a correlation of 0.90 or more. 8% of half icons and blots have a
# correlation above 0.85 with some object, and at most 2% with the object that the caption names.
MIN_SCORE = 0.85
# Smallest share of a cell's ink that must be nearer to the chosen color than to other colors. With
# 0.65, 4% of two-colored icons get one of their colors. With 0.75, 5% of true icons with blur,
# blotches and color errors get no color.
MIN_COLOR_SHARE = 0.7
# Smallest ink of an object in pixels, which is 4% of a cell. Less ink is a speck: the ink of true
# objects covers at least 15% of a cell.
MIN_INK = 23
FAINT = 0.25  # A pixel with a lower opacity counts as background.
SOLID = 0.5  # The color of a pixel is compared only if its opacity is higher.
MAX_SHIFT = 2  # Largest shift of an object from its place, in pixels per axis.
BLURS = (0.0, 0.7)  # Standard deviations, in pixels, of the blurs applied to silhouettes.
PALETTE = 1 - np.array(list(COLORS.values()), np.float32) / 255  # [C, 3], differences from white.
CHUNK = 128  # Number of cells that are judged together.


def find_objects(
  images: np.ndarray, style: Style = "filled", min_score: float = MIN_SCORE
) -> list[tuple[Found, ...]]:
  """Finds the objects of images. The objects of an image are in the order of the places.

  `images` are [B, H, W, 3] uint8. Sizes other than 48 x 48 are scaled. An object is unknown if its
  correlation with each silhouette is below `min_score`.
  """
  cells = _cells(images)
  # Most cells are blank, and samples of a prompt often equal each other.
  numbers: dict[bytes, int] = {}
  which = [numbers.setdefault(cell.tobytes(), len(numbers)) for cell in cells]
  distinct = cells[np.unique(which, return_index=True)[1]]
  seen: list[_Seen | None] = []
  for start in range(0, len(distinct), CHUNK):
    seen += _find_in_cells(distinct[start : start + CHUNK], style, min_score)
  result: list[list[Found]] = [[] for _ in images]
  for cell, number in enumerate(which):
    image, place = divmod(cell, len(world.PLACES))
    if (one := seen[number]) is not None:
      box = _box(one.visible, place)
      result[image].append(Found(one.name, one.color, world.PLACES[place], one.score, box))
  return [tuple(objects) for objects in result]


def opacities(images: np.ndarray) -> np.ndarray:
  """Returns the opacities of the color that fits each place best, [B, 4, CELL, CELL] fp32."""
  return _find_colors(_ink(_cells(images)))[0].reshape(len(images), -1, CELL, CELL)


class _Seen(NamedTuple):
  """Object of a cell, its color, its correlation, and its ink, [24, 24]."""

  name: str
  color: str
  score: float
  visible: np.ndarray


def _find_in_cells(cells: np.ndarray, style: Style, min_score: float) -> list[_Seen | None]:
  """Finds the objects of cells, [N, 24, 24, 3] uint8. Returns None for a cell without ink."""
  opacity, colors = _find_colors(_ink(cells))
  visible = np.where(opacity > FAINT, opacity, 0)
  occupied = np.flatnonzero(visible.sum((1, 2)) >= MIN_INK)
  names, scores = _match(opacity[occupied], style)
  result: list[_Seen | None] = [None] * len(cells)
  for cell, name, score in zip(occupied, names, scores):
    name = name if score >= min_score else UNKNOWN
    result[cell] = _Seen(name, colors[cell], float(score), visible[cell])
  return result


def judge_all(
  images: np.ndarray, facts: Sequence[dict], style: Style = "filled"
) -> list[SceneVerdict]:
  """Judges images by the facts of their captions.

  `images` are [B, H, W, 3] uint8. Sizes other than 48 x 48 are scaled. Of the facts, only the field
  `include` is read (docs/evaluation.md).
  """
  result = find_objects(images, style)
  return [check(objects, fact["include"]) for objects, fact in zip(result, facts)]


def judge(image: npt.ArrayLike, facts: dict) -> SceneVerdict:
  """Judges one image, [H, W, 3] uint8, by the facts of a caption; see `judge_all`."""
  return judge_all(np.asarray(image)[None], [facts])[0]


def _cells(images: npt.ArrayLike) -> np.ndarray:
  """Cuts images into cells: [B, H, W, 3] uint8 -> [B * 4, 24, 24, 3] uint8."""
  images = np.asarray(images)
  if images.shape[1:3] != (SIDE, SIDE):
    scaled = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    images = np.stack([np.asarray(image) for image in scaled])
  cells = images.reshape(-1, 2, CELL, 2, CELL, 3).swapaxes(2, 3)
  return cells.reshape(-1, CELL, CELL, 3)


def _ink(cells: np.ndarray) -> np.ndarray:
  """Returns how far each channel of a pixel is from white, fp32: 0 = white, 1 = black."""
  return 1 - cells.astype(np.float32) / 255


def _find_colors(cells: np.ndarray) -> tuple[np.ndarray, list[str]]:
  """Fits one color of the palette to the ink of each cell.

  A pixel is modeled as white * (1 - opacity) + color * opacity. For each color and pixel, the
  opacity with the smallest squared error is computed. The color with the smallest total error is
  chosen for the cell. Returns the opacities of the chosen colors, [N, 24, 24] fp32, and N color
  names. A name is `UNKNOWN` if other colors are nearer to many solid pixels, or no pixel is solid.
  """
  names = tuple(COLORS)
  opacity, errors = _explain(cells)
  best = errors.sum(1).argmin(1)
  own = np.take_along_axis(opacity, best[:, None, None], 2)[..., 0]
  # In a lossy image, color is noisier than ink, so the color of a pixel is a mean of 3 x 3 pixels.
  nearest = _explain(ndimage.uniform_filter(cells, (0, 3, 3, 0)))[1].argmin(2)
  solid = np.take_along_axis(opacity, nearest[..., None], 2)[..., 0] > SOLID
  agreeing, all_solid = (solid & (nearest == best[:, None])).sum(1), solid.sum(1)
  clear = (all_solid > 0) & (agreeing >= MIN_COLOR_SHARE * all_solid)
  result = [names[color] if is_clear else UNKNOWN for color, is_clear in zip(best, clear)]
  return own.reshape(cells.shape[:3]), result


def _explain(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Fits every color to every pixel. Returns opacities and squared errors, [N, P, C] fp32 each."""
  # Channels one by one: NumPy is slow at sums over an axis of three.
  ink = np.moveaxis(cells.reshape(len(cells), -1, 1, 3), -1, 0)
  channels = list(zip(ink, PALETTE.T))
  product = functools.reduce(np.add, (pixels * color for pixels, color in channels))
  opacity = np.clip(product / (PALETTE**2).sum(-1), 0, 1)
  errors = ((pixels - opacity * color) ** 2 for pixels, color in channels)
  return opacity, functools.reduce(np.add, errors)


def _unit(pixels: np.ndarray) -> np.ndarray:
  """Flattens cells [..., 24, 24] to [..., P] fp32, and scales each to mean 0 and norm 1."""
  flat = pixels.reshape(*pixels.shape[:-2], -1)
  flat = flat - flat.mean(-1, keepdims=True)
  return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-6)


@functools.cache
def _silhouettes(style: Style) -> tuple[tuple[str, ...], list[np.ndarray]]:
  """Returns the names of all M objects and, for each blur, their silhouettes, [M, P] fp32."""
  icons = world.ICONS
  drawn = np.stack([drawings.ink(icon, style) for icon in icons.values()]) / np.float32(255)
  return tuple(icons), [_unit(ndimage.gaussian_filter(drawn, (0, b, b))) for b in BLURS]


def _match(opacity: np.ndarray, style: Style) -> tuple[list[str], np.ndarray]:
  """Finds the silhouette that correlates best with each cell, over all shifts and blurs.

  `opacity` is [N, 24, 24]. Returns N names of objects, and [N] fp32 correlations.
  """
  names, banks = _silhouettes(style)
  if not len(opacity):
    return [], np.zeros(0, np.float32)
  shifted = _unit(_shifts(opacity))  # [N, S, P]
  flat = shifted.reshape(-1, shifted.shape[-1])
  each = [(flat @ bank.T).reshape(*shifted.shape[:2], -1).max(1) for bank in banks]
  scores = np.maximum.reduce(each)  # [N, M]
  return [names[i] for i in scores.argmax(1)], scores.max(1)


def _shifts(opacity: np.ndarray) -> np.ndarray:
  """Shifts [N, 24, 24] by up to MAX_SHIFT pixels, padded with white: [N, S, 24, 24]."""
  most = MAX_SHIFT
  padded = np.pad(opacity, ((0, 0), (most, most), (most, most)))
  starts = itertools.product(range(2 * most + 1), repeat=2)
  return np.stack([padded[:, y : y + CELL, x : x + CELL] for y, x in starts], 1)


def _box(ink: np.ndarray, place: int) -> tuple[int, int, int, int]:
  """Returns the box of the ink of a cell, [24, 24], in image coordinates."""
  rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
  left, top = drawings.corner(world.PLACES[place])
  right, bottom = left + columns[-1] + 1, top + rows[-1] + 1
  return int(left + columns[0]), int(top + rows[0]), int(right), int(bottom)
