"""Renders a sheet of judged images: captions, originals, neighbors and marked samples."""

# H height, W width.

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RIGHT, WRONG, FAINT, INK = (0, 135, 75), (213, 60, 40), (205, 205, 205), (30, 30, 30)
ACROSS = 2  # Number of captions per row.
SIDE = 144  # Side of an image on the sheet in pixels.
FRAME = 5
BADGE = 34  # Diameter of a mark, which is drawn on the lower right corner of the frame.
FONT, TITLE_FONT, LINE = 23, 19, 29  # Font sizes and line height in pixels.
# Space at the border of the sheet, between images, between captions of a row, and between rows.
MARGIN, GAP, BETWEEN, BELOW = 20, 18, 44, 28
TITLE_GAP = 8
CAPTION_LINES = 2
LEGEND = ((True, "shows exactly what the caption says"), (False, "does not"))


@dataclasses.dataclass(frozen=True)
class SheetImages:
  """Caption on the sheet, and its images.

  Attributes:
    original: [H, W, 3] uint8, the image of the caption's document.
    neighbors: [H, W, 3] uint8 each, images of the retrieved documents that precede the caption.
    samples: title -> (image [H, W, 3] uint8, whether the judge finds it correct). All captions have
      the same titles.
  """

  caption: str
  original: np.ndarray
  neighbors: tuple[np.ndarray, ...]
  samples: dict[str, tuple[np.ndarray, bool]]


def render(shown: Sequence[SheetImages]) -> Image.Image:
  """Draws captions in rows. Each stands above its original image, neighbors and samples.

  Images are scaled to `SIDE`. Correct samples get a check mark and a green frame. Wrong samples get
  a cross and a red frame. There must be at least one caption.
  """
  neighbors = max(len(one.neighbors) for one in shown)
  titles = ["original", *["neighbor"] * neighbors, *shown[0].samples]
  cell, across = SIDE + 2 * FRAME, min(ACROSS, len(shown))
  block = len(titles) * (cell + GAP) - GAP
  font, title_font = ImageFont.load_default(FONT), ImageFont.load_default(TITLE_FONT)
  captions = [_lines(one.caption, block, font) for one in shown]
  rows = [captions[start : start + across] for start in range(0, len(shown), across)]
  texts = [LINE * max(map(len, row)) for row in rows]
  tops = np.cumsum([MARGIN + LINE + TITLE_GAP, *[text + cell + BELOW for text in texts]]).tolist()
  bottom = tops[-1]
  size = (2 * MARGIN + across * (block + BETWEEN) - BETWEEN, bottom + LINE + MARGIN)
  sheet = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(sheet)
  for i, (one, lines) in enumerate(zip(shown, captions)):
    row, place = divmod(i, across)
    left, upper = MARGIN + place * (block + BETWEEN), tops[row] + texts[row]
    for n, line in enumerate(reversed(lines)):  # The last line is directly above the images.
      draw.text((left, upper - (n + 1) * LINE), line, INK, font)
    for n, (title, (image, right)) in enumerate(zip(titles, _cells(one, neighbors))):
      x = left + n * (cell + GAP)
      if row == 0:
        draw.text((x, MARGIN), title, "gray", title_font)
      if image is not None:
        _place(sheet, image, right, (x, upper))
  x = MARGIN
  for right, meaning in LEGEND:
    sheet.paste(_badge(right), (x, bottom), _badge(right))
    draw.text((x + BADGE + 8, bottom + BADGE // 2), meaning, "gray", title_font, anchor="lm")
    x += BADGE + 8 + round(title_font.getlength(meaning)) + 2 * GAP
  return sheet


def _cells(
  one: SheetImages, neighbors: int
) -> list[tuple[np.ndarray, None] | tuple[None, None] | tuple[np.ndarray, bool]]:
  """Returns the images of a caption, with empty cells for missing neighbors."""
  missing = neighbors - len(one.neighbors)
  given = [(image, None) for image in (one.original, *one.neighbors)]
  return [*given, *[(None, None)] * missing, *one.samples.values()]


def _place(sheet: Image.Image, image: np.ndarray, right: bool | None, at: tuple[int, int]) -> None:
  """Draws an image and its frame at the upper left corner `at`. Marks it if `right` is set."""
  x, y, side = *at, SIDE + 2 * FRAME
  color, width = (FAINT, 1) if right is None else (RIGHT if right else WRONG, FRAME)
  scaled = Image.fromarray(np.asarray(image)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
  sheet.paste(scaled, (x + FRAME, y + FRAME))
  box = (x, y, x + side - 1, y + side - 1)
  ImageDraw.Draw(sheet).rectangle(box, outline=color, width=width)
  if right is not None:
    shift = side - FRAME // 2 - BADGE // 2
    sheet.paste(_badge(right), (x + shift, y + shift), _badge(right))


@functools.cache
def _badge(right: bool) -> Image.Image:
  """Draws a white check mark on a green disc, or a white cross on a red disc.

  The image is RGBA, BADGE x BADGE pixels.
  """
  large = 8 * BADGE

  def points(*shares: float) -> list[float]:
    return [share * large for share in shares]

  badge = Image.new("RGBA", (large, large), (255, 255, 255, 0))
  draw = ImageDraw.Draw(badge)
  draw.ellipse(points(0, 0, 1, 1), fill="white")
  draw.ellipse(points(0.07, 0.07, 0.93, 0.93), fill=RIGHT if right else WRONG)
  check = [(0.28, 0.52, 0.44, 0.68, 0.73, 0.34)]
  cross = [(0.33, 0.33, 0.67, 0.67), (0.33, 0.67, 0.67, 0.33)]
  for line in check if right else cross:
    draw.line(points(*line), "white", large // 8, joint="curve")
  return badge.resize((BADGE, BADGE), Image.Resampling.LANCZOS)


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
  """Breaks a text into up to `CAPTION_LINES` lines of `width` pixels. A cut text ends in "..."."""
  lines = [""]
  for word in text.split():
    longer = f"{lines[-1]} {word}".strip()
    if font.getlength(longer) <= width or not lines[-1]:
      lines[-1] = longer
    else:
      lines.append(word)
  kept = lines[:CAPTION_LINES]
  return kept if kept == lines else [*kept[:-1], kept[-1] + " ..."]
