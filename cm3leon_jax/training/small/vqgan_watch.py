"""Watches the training of the image tokenizer: an alarm at a collapse, curves and grids."""

# B batch, T codes of an image, K codes.

from collections.abc import Callable, Sequence
import dataclasses
import io

from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.tokenizers.config import VQGANConfig

GRID = "reconstructions.png"
SHOWN = 8  # Images of the grid.
TITLE, GAP = 20, 4  # Pixels of a row's title, and between images.
# A batch's codes have collapsed if no more than this share of what is possible occurs in it.
# Perplexity is no sign: it is about 10 of 1,024 where most of an image is background.
COLLAPSED = 0.05
PATIENCE = 100  # Steps of it before the alarm.


def grid(images: np.ndarray, reconstructions: np.ndarray, step: int) -> Image.Image:
  """Lays out a row of images above their reconstructions, each row below its title.

  Args:
    images: uint8 [n, H, W, 3]; small ones are enlarged.
    reconstructions: uint8 [n, H, W, 3].
    step: whose reconstructions they are.
  """
  scale = max(1, 128 // images.shape[1])
  count, height, width = len(images), scale * images.shape[1], scale * images.shape[2]
  size = GAP + count * (width + GAP), 2 * (TITLE + height + GAP)
  sheet = Image.new("RGB", size, "lightgray")  # White images must have an edge.
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TITLE - 8)
  rows = {"held-out images": images, f"their reconstructions at step {step:,}": reconstructions}
  for number, (title, row) in enumerate(rows.items()):
    top = number * (TITLE + height + GAP)
    draw.text((GAP, top + 2), title, "black", font)
    for i, pixels in enumerate(row):
      image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
      sheet.paste(image, (GAP + i * (width + GAP), top + TITLE))
  return sheet


class Alarm:
  """Prints a line when the codebook has collapsed for `PATIENCE` steps, and again if it recurs."""

  def __init__(self, config: VQGANConfig, num_codes: int, remedy: str):
    """Watches a training.

    Args:
      config: of the VQGAN.
      num_codes: K.
      remedy: how to start again, the end of the line.
    """
    self._config, self._num_codes, self._remedy = config, num_codes, remedy
    self._possible = min(num_codes, config.batch_size * config.image_tokens)
    self._bound = max(1.0, COLLAPSED * self._possible)
    self._since: int | None = None
    self._rung = False

  def check(self, step: int, perplexity: float, codes_used: float) -> str | None:
    """Returns the alarm, if it is due.

    Args:
      step: whose batch is described.
      perplexity: of the codes of the batch.
      codes_used: number of different codes of the batch.
    """
    if codes_used > self._bound or self._possible == 1:
      self._since, self._rung = None, False
      return None
    self._since = step if self._since is None else self._since
    if self._rung or step - self._since < PATIENCE:
      return None
    self._rung = True
    return (
      f"vqgan: step {step}: the codebook has collapsed: for {PATIENCE} steps batches have had at "
      f"most {self._bound:.0f} of {self._num_codes:,} codes, now {codes_used:.0f} of perplexity "
      f"{perplexity:.1f}. {self._advice()}; {self._remedy}"
    )

  def _advice(self) -> str:
    config, advice = self._config, []
    has_codebook = config.quantizer != "fsq"
    if has_codebook and not 0 < config.restart_every <= PATIENCE:
      advice.append(f"set config.vqgan.restart_every to {PATIENCE} (it is {config.restart_every})")
    if has_codebook and config.commitment_weight > 0.25:
      weight = f"{config.commitment_weight:g}"
      advice.append(f"lower config.vqgan.commitment_weight to 0.25 (it is {weight})")
    if not advice:
      advice.append(f"lower config.vqgan.learning_rate (it is {config.learning_rate:g})")
    if has_codebook:
      advice.append("or set config.vqgan.quantizer to fsq")
    text = ", ".join(advice)
    return text[0].upper() + text[1:]


@dataclasses.dataclass
class Watch:
  """Shows a training while it goes on.

  Attributes:
    alarm: at a collapse.
    folder: gets the grid.
    open_boards: first step -> boards, see `training.boards.Board`; opened at the first values.
    reconstruct: (state, images) -> their reconstructions.
    images: held-out images of the grid, uint8 [n, H, W, 3], or None.
    boards: that are open, or None.
  """

  alarm: Alarm
  folder: epath.PathLike
  open_boards: Callable[[int], Sequence]
  reconstruct: Callable[[dict, np.ndarray], np.ndarray]
  images: np.ndarray | None = None
  boards: Sequence | None = None

  def log(self, step: int, values: dict[str, float]) -> None:
    """Shows the metrics of a step."""
    for board in self._boards(step):
      board.scalars(step, values)
    if line := self.alarm.check(step, values["perplexity"], values["codes_used"]):
      print(line, flush=True)

  def save(self, step: int, state: dict) -> None:
    """Writes the grid of a state that is saved, in place of the last one."""
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
    """Closes the boards."""
    for board in self.boards or ():
      board.close()

  def _boards(self, step: int) -> Sequence:
    if self.boards is None:
      self.boards = self.open_boards(step)
    return self.boards
