"""Writes scalars and grids of samples to TensorBoard."""

import importlib
import json
import os

from etils import epath
import numpy as np
from PIL import Image

FOLDER = "tensorboard"
FLUSH_SECONDS = 30
SCALARS = (
  "loss",
  "image_loss",
  "text_loss",
  "grad_norm",
  "learning_rate",
  "tokens_per_second",
  "mfu",
  "goodput",
  "mse",
  "perplexity",
  "codes_used",
  "discriminator_loss",
  "adversarial_weight",
)


def curves(values: dict) -> dict[str, float]:
  """Selects the values of a metrics line that are shown as curves, and renames them.

  {"loss": 2.5, "weight": 8.0, "heldout_image_loss": 1.5} ->
  {"train/loss": 2.5, "heldout/image_loss": 1.5}
  {"loss/draw": 2.1, "heldout_loss/draw": 2.0} is returned unchanged.
  """
  heldout = {
    f"heldout/{k.removeprefix('heldout_')}": x
    for k, x in values.items()
    if k.startswith("heldout_") and "/" not in k
  }
  by_source = {k: x for k, x in values.items() if "/" in k}
  return heldout | by_source | {f"train/{k}": x for k, x in values.items() if k in SCALARS}


class TensorBoard:
  """Writes event files. For a folder in a GCS bucket, google-cloud-storage must be installed."""

  def __init__(self, folder: epath.PathLike, first_step: int, settings: dict | None = None):
    """Opens an event file.

    Args:
      first_step: first step of this start. TensorBoard hides events of earlier starts from this
        step on.
      settings: shown as the text `config`, one line per field.

    Raises:
      ImportError: tensorboardX, or google-cloud-storage for a GCS bucket, is not installed.
    """
    import tensorboardX  # An optional dependency.

    if os.fspath(folder).startswith("gs://"):
      importlib.import_module("google.cloud.storage")  # Fail now; tensorboardX would fail later.
    # The suffix makes file names unique. Their time stamp has a resolution of one second, and an
    # existing file would be overwritten.
    suffix = f".{os.getpid()}.{first_step}"
    self._writer = tensorboardX.SummaryWriter(
      os.fspath(folder), purge_step=first_step, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
    )
    if settings:
      lines = json.dumps(settings, indent=1).splitlines()
      self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), first_step)

  def scalars(self, step: int, values: dict) -> None:
    """Writes the `curves` of a metrics line."""
    for tag, value in curves(values).items():
      self._writer.add_scalar(tag, value, step)

  def samples(self, step: int, sheet: Image.Image) -> None:
    """Writes a grid of samples, a PIL image."""
    self._writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()
