"""Pictures on disk: single PNG files and labeled contact sheets."""

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
  (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(
    buffer, "PNG", optimize=True
  )
  partial = path.parent / (path.name + ".partial")
  partial.write_bytes(buffer.getvalue())
  partial.replace(path)


def contact_sheet(
  rows: Sequence[Sequence], labels: Sequence[str], columns: Sequence[str] = ()
) -> Image.Image:
  """One row a prompt, its text at the left; small pictures are enlarged without smoothing.

  Args:
    rows: cells, each a picture [H, W, 3] uint8, all of one size, or a text; rows may differ in length.
    labels: text of each row.
    columns: text above each column.

  Returns:
    The sheet.
  """
  sizes = [np.shape(cell)[:2] for row in rows for cell in row if not isinstance(cell, str)]
  height, width = sizes[0] if sizes else (CELL, CELL)
  scale = max(1, -(-CELL // min(height, width)))
  height, width = height * scale, width * scale
  count, top = max(len(row) for row in rows), LABEL_HEIGHT if columns else GAP
  sheet = Image.new(
    "RGB", (LABEL_WIDTH + count * (width + GAP), top + len(rows) * (height + GAP)), "white"
  )
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  for j, label in enumerate(columns):
    draw.text((LABEL_WIDTH + j * (width + GAP), GAP // 2), label, "black", font)
  for i, (row, label) in enumerate(zip(rows, labels)):
    y = top + i * (height + GAP)
    draw.text((GAP, y), wrapped(label, LABEL_WIDTH, height), "black", font)
    for j, cell in enumerate(row):
      x = LABEL_WIDTH + j * (width + GAP)
      if isinstance(cell, str):
        draw.text((x, y), wrapped(cell, width, height), "black", font)
      else:
        sheet.paste(
          Image.fromarray(np.asarray(cell)).resize((width, height), Image.Resampling.NEAREST),
          (x, y),
        )
  return sheet


def wrapped(text: str, width: int, height: int) -> str:
  """The text in lines for a cell of so many pixels; what does not fit gives way to an ellipsis."""
  lines, most = textwrap.wrap(text, max(1, width * 22 // LABEL_WIDTH)), max(1, height // 14)
  return "\n".join(
    lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-1] + "…"]
  )
