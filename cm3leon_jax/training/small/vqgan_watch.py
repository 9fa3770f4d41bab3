"""Shows the image tokenizer's training as curves and grids; warns if its codebook collapses."""

# B batch, T codes per image, K codes.

from collections.abc import Callable, Sequence
import dataclasses
import io

from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.tokenizers.config import VQGANConfig

GRID = "reconstructions.png"
SHOWN = 8  # Number of images in the grid.
TITLE, GAP = 20, 4  # Height of a row's title, and space between images, in pixels.
# The codebook counts as collapsed if a batch uses at most this share of the codes it could use.
# Perplexity is not a reliable sign: it is about 10 for 1,024 codes if most of an image is
# background.
COLLAPSED = 0.05
PATIENCE = 100  # Number of steps that a collapse must last before the warning.


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


class Alarm:
  """Warns when a collapse of the codebook has lasted `PATIENCE` steps, and again if it recurs."""

  def __init__(self, config: VQGANConfig, num_codes: int, remedy: str):
    """Creates the alarm. `remedy` ends the warning and says how to start the training again."""
    self._config, self._num_codes, self._remedy = config, num_codes, remedy
    self._possible = min(num_codes, config.batch_size * config.image_tokens)
    self._bound = max(1.0, COLLAPSED * self._possible)
    self._since: int | None = None
    self._rung = False

  def check(self, step: int, perplexity: float, codes_used: float) -> str | None:
    """Returns the warning that is due at `step`, or None."""
    if codes_used > self._bound or self._possible == 1:
      self._since, self._rung = None, False
      return None
    self._since = step if self._since is None else self._since
    if self._rung or step - self._since < PATIENCE:
      return None
    self._rung = True
    return (
      f"vqgan: step {step}: the codebook has collapsed: for {PATIENCE} steps, each batch has used "
      f"at most {self._bound:.0f} of {self._num_codes:,} codes, now {codes_used:.0f} with "
      f"perplexity {perplexity:.1f}. {self._advice()}; {self._remedy}"
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
  """Shows a VQGAN training while it runs.

  Attributes:
    folder: receives the grid.
    open_boards: maps the first step to open boards, see `watch.boards.Board`. Called when the first
      values arrive.
    reconstruct: (state, images) -> reconstructions.
    images: held-out images for the grid, uint8 [n, H, W, 3]; None: no grid.
    boards: the open boards; None: not opened yet.
  """

  alarm: Alarm
  folder: epath.PathLike
  open_boards: Callable[[int], Sequence]
  reconstruct: Callable[[dict, np.ndarray], np.ndarray]
  images: np.ndarray | None = None
  boards: Sequence | None = None

  def log(self, step: int, values: dict[str, float]) -> None:
    """Shows the metrics of a step, and prints a warning if the codebook has collapsed."""
    for board in self._boards(step):
      board.scalars(step, values)
    if line := self.alarm.check(step, values["perplexity"], values["codes_used"]):
      print(line, flush=True)

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
