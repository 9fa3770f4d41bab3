"""Writes scalars, grids of samples and histograms of parameters to TensorBoard."""

import importlib
import json
import os

from etils import epath
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from PIL import Image

FOLDER = "tensorboard"
FLUSH_SECONDS = 30
INTERVALS = 30  # Number of equal intervals between the smallest and the largest value.
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

  def histograms(self, step: int, histograms: dict) -> None:
    """Writes the histograms of `named_histograms`."""
    for name, histogram in histograms.items():
      fields = {k: np.asarray(x).tolist() for k, x in histogram.items()}
      self._writer.add_histogram_raw(f"params/{name}", **fields, global_step=step)

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


@jax.jit
def tree_histograms(params: dict) -> dict:
  """Computes a histogram of each parameter, over all layers together.

  Uses only comparisons and sums over whole arrays, so sharded arrays are not gathered. Returns a
  tree with a dict for each parameter. The dict contains the fp32 scalars min, max, num, sum and
  sum_squares, and two fp32 arrays [INTERVALS]: bucket_limits (upper ends of intervals of equal
  width) and bucket_counts (exact up to 2^24).
  """

  def histogram(x: Float[Array, "..."]) -> dict[str, Array | float]:
    low, high = jnp.min(x), jnp.max(x)
    limits = low + (high - low) * jnp.arange(1, INTERVALS, dtype=jnp.float32) / INTERVALS
    below = jax.lax.map(lambda limit: jnp.sum(x < limit, dtype=jnp.float32), limits)
    below = jnp.concatenate([below, jnp.array([x.size], jnp.float32)])
    return {
      "min": low, "max": high, "num": float(x.size),
      "sum": jnp.sum(x), "sum_squares": jnp.sum(x * x),
      "bucket_limits": jnp.append(limits, high), "bucket_counts": jnp.diff(below, prepend=0.0),
    }  # fmt: skip

  return jax.tree.map(histogram, params)


def named_histograms(params: dict) -> dict[str, dict]:
  """Returns parameter name, e.g. "blocks/up" -> its histogram. All processes must call it."""
  histograms = jax.device_get(tree_histograms(params))
  leaves = jax.tree.leaves_with_path(histograms, is_leaf=lambda node: "bucket_counts" in node)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
