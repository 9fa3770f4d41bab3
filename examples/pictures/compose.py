"""Composes pictures: drawings at several scales on a ground, text, textures and photographs."""

from collections.abc import Sequence
import dataclasses
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.pictures.sources import Font, Photograph

# H height, W width, n tiles.

SIDE = 64  # Pixels of a picture.
SCALES = {32: 0.2, 48: 0.35, 64: 0.3, 128: 0.15}  # Side of a drawing in pixels -> probability.
_FILTERS = (Image.Resampling.LANCZOS, Image.Resampling.BOX)


@dataclasses.dataclass(frozen=True)
class Grounds:
  """Makes the grounds on which drawings and text are put."""

  photographs: Sequence[Photograph]

  def make(self, rng: np.random.Generator, white: float) -> tuple[np.ndarray, Photograph | None]:
    """Returns a ground, [SIDE, SIDE, 3] float, and the photograph that it shows."""
    kind = rng.choice(4, p=[white, *3 * [(1 - white) / 3]])
    if kind == 0:
      return np.full((SIDE, SIDE, 3), 255.0), None
    if kind == 1:
      return np.broadcast_to(rng.uniform(0, 255, 3), (SIDE, SIDE, 3)), None
    if kind == 2:
      return texture(rng), None
    photograph = self.photographs[rng.integers(len(self.photographs))]
    return crop(photograph.image, rng, SIDE), photograph


def crop(image: Image.Image, rng: np.random.Generator, side: int) -> np.ndarray:
  """Returns a random square of an image, scaled to [side, side, 3] float."""
  size = int(rng.uniform(SIDE, min(image.size)))
  left, top = (int(rng.integers(length - size + 1)) for length in image.size)
  cut = image.crop((left, top, left + size, top + size))
  return np.asarray(cut.resize((side, side), Image.Resampling.LANCZOS), float)


def texture(rng: np.random.Generator) -> np.ndarray:
  """Returns a gradient, stripes, checks or noise of random colors, [SIDE, SIDE, 3] float."""
  y, x = np.mgrid[:SIDE, :SIDE] / SIDE
  angle = rng.uniform(0, 2 * np.pi)
  along, across = x * np.cos(angle) + y * np.sin(angle), x * np.sin(angle) - y * np.cos(angle)
  kind = rng.integers(5)
  if kind == 0:  # Linear gradient.
    mix = along
  elif kind == 1:  # Radial gradient.
    mix = np.hypot(x - rng.uniform(), y - rng.uniform())
  elif kind == 2:  # Stripes.
    mix = np.clip(np.sin(along * rng.uniform(5, 60)) * 4, -1, 1)
  elif kind == 3:  # Checks.
    mix = np.sign(np.sin(along * rng.uniform(5, 40)) * np.sin(across * rng.uniform(5, 40)))
  else:  # Noise.
    size = int(rng.choice([3, 5, 9, 17, 33]))
    noise = rng.uniform(0, 255, (size, size)).astype(np.uint8)
    mix = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    mix = np.asarray(mix, float)
  mix = (mix - mix.min()) / max(np.ptp(mix), 1e-6)
  first, second = rng.uniform(0, 255, (2, 3))
  return first + mix[..., None] * (second - first)


class Layout(NamedTuple):
  """A window of SIDE pixels on a plane of drawings: their side, rows and columns; its corner."""

  side: int
  rows: int
  columns: int
  top: int
  left: int
  filter: Image.Resampling

  @classmethod
  def random(cls, rng: np.random.Generator) -> "Layout":
    side = int(rng.choice(list(SCALES), p=list(SCALES.values())))
    fits = side < 2 * SIDE and SIDE % side == 0 and rng.uniform() < 0.6
    top, left = (0, 0) if fits else rng.integers(0, side, 2)
    if side > SIDE:
      top, left = rng.integers(0, side - SIDE + 1, 2)
    rows, columns = (-(-(SIDE + start) // side) for start in (top, left))
    return cls(side, rows, columns, top, left, _FILTERS[rng.integers(len(_FILTERS))])


def window(images: Sequence[np.ndarray], layout: Layout) -> np.ndarray:
  """Returns the window of a plane of drawings, [H, W, 4] uint8, as [SIDE, SIDE, 4] float."""
  size = layout.side, layout.side
  small = [np.asarray(Image.fromarray(x).resize(size, layout.filter)) for x in images]
  starts = range(0, len(small), layout.columns)
  plane = np.concatenate([np.concatenate(small[i : i + layout.columns], 1) for i in starts])
  return plane[layout.top :, layout.left :][:SIDE, :SIDE].astype(float)


def over(front: np.ndarray, ground: np.ndarray) -> np.ndarray:
  """Puts [H, W, 4] on a ground [H, W, 3]. Returns uint8."""
  alpha = front[..., 3:] / 255
  return np.round(np.clip(alpha * front[..., :3] + (1 - alpha) * ground, 0, 255)).astype(np.uint8)


def text(
  words: Sequence[str], font: Font, rng: np.random.Generator, ground: Image.Image
) -> np.ndarray:
  """Writes lines of words in a size and color that contrasts with the ground. Returns uint8."""
  side = ground.width
  size = int(side * np.exp(rng.uniform(np.log(0.12), np.log(0.7))))
  draw = ImageDraw.Draw(ground)
  face = ImageFont.truetype(io.BytesIO(font.content), size)
  color = rng.uniform(0, 130, 3) if np.mean(ground) > 128 else rng.uniform(125, 255, 3)
  lines = max(1, int(side / size / 1.3))
  chosen = iter(rng.permutation(len(words)))
  for line in range(lines):
    line_words = " ".join(words[next(chosen)] for _ in range(2))
    start = rng.uniform(-0.3, 0.1) * side if size > side / 4 else 0.05 * side
    at = (start, line * size * 1.3 + 0.02 * side)
    draw.text(at, line_words, tuple(color.astype(int).tolist()), face)
  return np.asarray(ground)
