"""Pictures on disk: single PNG files and labelled contact sheets."""

# H height, W width of one picture.

from collections.abc import Sequence
import io
import textwrap

from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 128  # Smallest edge of a picture on a sheet, in pixels.
GAP = 6
LABEL_WIDTH = 150
LABEL_HEIGHT = 20


def save_png(path: epath.PathLike, image) -> None:
  """Writes [H, W, 3] uint8, or a PIL image, atomically."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(buffer, "PNG", optimize=True)
  partial = path.parent / (path.name + ".partial")
  partial.write_bytes(buffer.getvalue())
  partial.replace(path)


def contact_sheet(rows: Sequence[Sequence], labels: Sequence[str], columns: Sequence[str] = ()) -> Image.Image:
  """One row a prompt, its text at the left; small pictures are enlarged without smoothing.

  Args:
    rows: pictures, each [H, W, 3] uint8, all of one size; rows may differ in length.
    labels: text of each row.
    columns: text above each column.

  Returns:
    The sheet.
  """
  height, width = np.shape(rows[0][0])[:2]
  scale = max(1, -(-CELL // min(height, width)))
  height, width = height * scale, width * scale
  count, top = max(len(row) for row in rows), LABEL_HEIGHT if columns else GAP
  sheet = Image.new("RGB", (LABEL_WIDTH + count * (width + GAP), top + len(rows) * (height + GAP)), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  for j, label in enumerate(columns):
    draw.text((LABEL_WIDTH + j * (width + GAP), GAP // 2), label, "black", font)
  for i, (row, label) in enumerate(zip(rows, labels)):
    y = top + i * (height + GAP)
    draw.text((GAP, y), "\n".join(textwrap.wrap(label, 22)[: height // 14]), "black", font)
    for j, image in enumerate(row):
      picture = Image.fromarray(np.asarray(image)).resize((width, height), Image.Resampling.NEAREST)
      sheet.paste(picture, (LABEL_WIDTH + j * (width + GAP), y))
  return sheet
