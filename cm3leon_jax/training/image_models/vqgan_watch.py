"""Shows the image tokenizer's training as curves and grids."""

from collections.abc import Callable, Sequence
import dataclasses
import io

from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cm3leon_jax.files.atomic import replacing

GRID = "reconstructions.png"
SHOWN = 8  # Number of images in the grid.
TITLE, GAP = 20, 4  # Height of a row's title, and space between images, in pixels.


def grid(images: np.ndarray, reconstructions: np.ndarray, step: int) -> Image.Image:
  """Draws a row of images above a row of their reconstructions, each with a title.

  Both arguments are uint8 [n, H, W, 3]. Small images are enlarged.
  """
  scale = max(1, 128 // images.shape[1])
  count, height, width = len(images), scale * images.shape[1], scale * images.shape[2]
  size = GAP + count * (width + GAP), 2 * (TITLE + height + GAP)
  sheet = Image.new("RGB", size, "lightgray")  # Makes the edges of white images visible.
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TITLE - 8)
  rows = {"held-out images": images, f"their reconstructions at step {step:,}": reconstructions}
  for number, (title, row) in enumerate(rows.items()):
    top = number * (TITLE + height + GAP)
    draw.text((GAP, top + 2), title, "black", font)
    for i, pixels in enumerate(row):
      image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
      sheet.paste(image, (GAP + i * (width + GAP), top + TITLE))
  return sheet


@dataclasses.dataclass
class Watch:
  """Shows a VQGAN training while it runs.

  Attributes:
    folder: receives the grid.
    open_boards: maps the first step to open boards, see `watch.boards.Board`. Called when the first
      values arrive.
    reconstruct: (state, images) -> reconstructions.
    images: held-out images for the grid, uint8 [n, H, W, 3]; None: no grid.
    boards: the open boards; None: not opened yet.
  """

  folder: epath.PathLike
  open_boards: Callable[[int], Sequence]
  reconstruct: Callable[[dict, np.ndarray], np.ndarray]
  images: np.ndarray | None = None
  boards: Sequence | None = None

  def log(self, step: int, values: dict[str, float]) -> None:
    """Shows the metrics of a step."""
    for board in self._boards(step):
      board.scalars(step, values)

  def save(self, step: int, state: dict) -> None:
    """Replaces the grid by one with the reconstructions of a saved state."""
    if self.images is None:
      return
    sheet, buffer = grid(self.images, self.reconstruct(state, self.images), step), io.BytesIO()
    sheet.save(buffer, "PNG")
    with replacing(epath.Path(self.folder) / GRID) as file:
      file.write(buffer.getvalue())
    for board in self._boards(step):
      board.samples(step, sheet)
      board.flush()

  def close(self) -> None:
    for board in self.boards or ():
      board.close()

  def _boards(self, step: int) -> Sequence:
    if self.boards is None:
      self.boards = self.open_boards(step)
    return self.boards
