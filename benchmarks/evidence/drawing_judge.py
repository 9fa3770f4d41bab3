"""Names what an image shows by the nearest of all true drawings, without a network.

An image shows the concept and the style of the nearest drawing. The judge compares mean colors of
small cells, at small shifts (`lab_cells`). A second judge compares histograms of gradients and of
colors (`shapes_and_colors`).
"""

# n images, N true drawings, H height, W width, F features.

from collections.abc import Callable, Iterable
import dataclasses
import itertools
import json
import pathlib
from typing import TypeAlias

from jaxtyping import Float, Int, UInt8
import numpy as np
from skimage import color, feature

from cm3leon_jax.data.raw import reader
from cm3leon_jax.errors import UserError

Images: TypeAlias = UInt8[np.ndarray, "n H W 3"]
Features: TypeAlias = Float[np.ndarray, "n F"]
# Pixels per side of a cell, and largest shift in pixels. Chosen on training drawings through a
# tokenizer (docs/log.md), never on samples.
CELL, SHIFT = 4, 1
BINS = ((0, 100, 5), (-90, 90, 9), (-90, 90, 9))  # Lowest and highest value, and number, in Lab.
CHUNK = 512  # Images whose features are computed together.


@dataclasses.dataclass(frozen=True)
class Drawings:
  """True drawings of all concepts and styles; [N] fields of their records and facts.

  `heldout` is "concept", "pair" or "", see `examples/illustrations`.
  """

  keys: np.ndarray
  captions: np.ndarray
  splits: np.ndarray
  concepts: np.ndarray
  styles: np.ndarray
  heldout: np.ndarray
  images: Images

  @classmethod
  def read(cls, folder: pathlib.Path, resolution: int) -> "Drawings":
    """Reads a folder of `examples/illustrations/make_data.py`. Raises UserError if it is none."""
    try:
      lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
      records = [json.loads(line) for line in lines]
      names = [[one[name] for one in records] for name in ("key", "caption", "split")]
      facts = [[one["facts"][name] for one in records] for name in ("concept", "style", "heldout")]
      paths = [folder / one["image"] for one in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{folder} has no records of drawings ({error!r}): write them with examples/illustrations/"
        "make_data.py, and name the folder in --data."
      ) from error
    return cls(*[*map(np.array, [*names, *facts]), reader.load_images(paths, resolution, 8)])


def lab_cells(images: Images) -> list[Features]:
  """Averages the Lab colors of squares of CELL x CELL pixels."""
  n, cells = len(images), images.shape[1] // CELL
  lab = color.rgb2lab(images / np.float32(255))
  means = lab.reshape(n, cells, CELL, cells, CELL, 3).mean((2, 4))
  return [means.reshape(n, -1).astype(np.float32)]


def shapes_and_colors(images: Images) -> list[Features]:
  """Computes histograms of gradients in 6 x 6 cells, and square roots of a histogram of Lab."""
  cell = (images.shape[1] // 6,) * 2
  options = {"pixels_per_cell": cell, "cells_per_block": (2, 2), "channel_axis": -1}
  gradients = [feature.hog(image, **options) for image in images]
  low, high, count = np.array(BINS, np.float32).T
  lab = color.rgb2lab(images / np.float32(255)).reshape(len(images), -1, 3)
  bins = np.clip((lab - low) / (high - low) * count, 0, count - 1).astype(int)
  sizes = tuple(map(int, count))
  places = np.asarray(np.ravel_multi_index(tuple(np.moveaxis(bins, -1, 0)), sizes))
  shares = [np.bincount(row, minlength=np.prod(sizes)) / len(row) for row in places]
  return [np.array(gradients, np.float32), np.sqrt(np.array(shares, np.float32))]


class Judge:
  """Finds the nearest true drawing by the Euclidean distance of features.

  Several kinds of features count equally: each is divided by its deviation over all drawings.
  """

  def __init__(
    self, drawings: Images, features: Callable[[Images], list[Features]], shift: int = 0
  ):
    """Computes the features of all true drawings. `shift` is in pixels, see `distances`."""
    self._features, self._shift = features, shift
    parts = self._parts(drawings)
    self._scales = [np.sqrt(part.var(0).sum()) for part in parts]
    self._drawings = self._joined(parts)

  def _parts(self, images: Images) -> list[Features]:
    starts = range(0, len(images), CHUNK)
    chunks = [self._features(images[start : start + CHUNK]) for start in starts]
    return [np.concatenate(kind) for kind in zip(*chunks)]

  def _joined(self, parts: Iterable[Features]) -> Features:
    return np.concatenate([x / scale for x, scale in zip(parts, self._scales)], axis=1)

  def distances(self, images: Images) -> Float[np.ndarray, "n N"]:
    """Computes squared distances to all true drawings, of which each counts at its best shift."""
    side, most = images.shape[1], self._shift
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), "edge")
    squares = (self._drawings**2).sum(1)
    best = np.full((len(images), len(squares)), np.inf, np.float32)
    for top, left in itertools.product(range(2 * most + 1), repeat=2):
      found = self._joined(self._parts(padded[:, top : top + side, left : left + side]))
      distances = (found**2).sum(1)[:, None] - 2 * found @ self._drawings.T + squares
      best = np.minimum(best, distances)
    return best

  def nearest(self, images: Images) -> Int[np.ndarray, " n"]:
    """Returns the index of the nearest true drawing of each image."""
    return self.distances(images).argmin(1)


# Arguments of both judges after the drawings.
JUDGES = ((lab_cells, SHIFT), (shapes_and_colors,))


def verdicts(drawings: Drawings, shown: np.ndarray, asked: np.ndarray) -> dict[str, np.ndarray]:
  """Compares what images show with what was asked for, both as indices of drawings.

  Returns {"pair", "concept", "style"}, each [n] bool: whether it is right.
  """
  concept = drawings.concepts[shown] == drawings.concepts[asked]
  style = drawings.styles[shown] == drawings.styles[asked]
  return {"pair": concept & style, "concept": concept, "style": style}
